"""What a schedule leaves out is not computed, and what is left is the model without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.branches import choices
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.graphs import aten
from blockwright.ir.program import Program
from blockwright.ir.recognize.chain import blocks_of, estimates_of
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.models.lego import TOY, Lego, chain
from blockwright.passes import DropBlocks, QuantizeWeights, SkipBricks

MASKS = {"111": (), "110": (2,), "101": (1,), "100": (1, 2)}  # bricks left out, from 0


@pytest.fixture(scope="module")
def lego() -> Lego:
    torch.manual_seed(0)
    model = Lego(replace(TOY, bricks=chain("8 4 2", "4 2 1", "2 2 1"))).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def inputs(lego: Lego) -> list[Tensor]:
    return list(lego.example_inputs())


@pytest.fixture(scope="module")
def captured(lego: Lego, inputs: list[Tensor]) -> Program:
    return bw.capture(lego, tuple(inputs))


@pytest.fixture(scope="module")
def skipping(captured: Program, inputs: list[Tensor]) -> Program:
    new, _ = run_passes(captured, [SkipBricks(steps=4, masks=tuple(MASKS))], [inputs])
    return new


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    schedule = SkipBricks(steps=2, masks=("111", "100"), stages="blocks")
    new, (step,) = run_passes(program, [schedule], [[tokens]])
    golden("skip_bricks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_the_chain_is_found(captured: Program, program: Program) -> None:
    found = estimates_of(captured)
    assert found is not None
    assert [len(values) for values in found.values] == [0, 1, 1, 1]
    assert estimates_of(program) is None
    (stack,) = program.stacks()
    blocks = blocks_of(stack)
    assert blocks is not None
    assert blocks.length == 3
    assert {str(node.target) for node in blocks.stages(2, 3).nodes} >= {"blocks.1", "blocks.2"}


@pytest.mark.parametrize("step", range(4))
def test_every_mask_is_the_chain_without_its_bricks_bit_by_bit(
    skipping: Program, lego: Lego, inputs: list[Tensor], step: int
) -> None:
    """With the full mask that is the model; without the last bricks, an estimate of the model."""
    flat = [*inputs, torch.tensor(step)]
    without = list(MASKS.values())[step]
    with torch.no_grad():
        expected = lego.estimates(*inputs, skipped=without)[-1]
        assert torch.equal(run(skipping, flat)[0], expected)
        assert torch.equal(skipping.module()(*flat)[0], expected)
        if step in (0, 1, 3):
            assert torch.equal(expected, lego.estimates(*inputs)[-1 - len(without)])


def test_blocks_stay_instances_and_weights_stay_where_they_are(
    captured: Program, skipping: Program
) -> None:
    assert set(skipping.tensors) - set(captured.tensors) == {"brick_2.active", "brick_3.active"}
    assert all(skipping.tensors[name] is tensor for name, tensor in captured.tensors.items())
    assert skipping.instances == captured.instances
    assert len(skipping.blocks()) == len(captured.blocks())
    assert len(skipping.attentions()) == len(captured.attentions())


def test_what_is_left_out_is_not_computed(skipping: Program, inputs: list[Tensor]) -> None:
    def attentions(step: int) -> int:
        seen: list[Any] = []
        flat = [*inputs, torch.tensor(step)]
        run(skipping, flat, on_node=lambda _, node, __: seen.append(node.target))
        return seen.count(aten.scaled_dot_product_attention.default)

    assert [attentions(step) for step in range(4)] == [5, 4, 3, 2]


def test_cost_is_that_of_the_dearest_step_and_of_the_average(
    skipping: Program, captured: Program, inputs: list[Tensor]
) -> None:
    cost = skipping.cost()
    assert cost.flops == captured.cost().flops + 2  # and two lookups
    costs = []
    for mask in MASKS:
        alone = SkipBricks(steps=1, masks=(mask,))
        new, _ = run_passes(captured, [replace(alone, allow_no_match=True)], [inputs])
        costs.append(new.cost().expected_flops - len(choices(new.main)))
    assert cost.expected_flops == round(sum(costs) / 4) + 2


def test_neighbours_of_one_schedule_are_one_choice(program: Program, tokens: Tensor) -> None:
    def count(*masks: str) -> int:
        schedule = SkipBricks(steps=len(masks), masks=masks, stages="blocks")
        new, _ = run_passes(program, [schedule], [[tokens]])
        return len(choices(new.main))

    assert count("111", "100") == 1
    assert count("000") == 1
    assert count("110", "101") == 2


def test_blocks_left_out_are_blocks_dropped(program: Program, tokens: Tensor, gpt: GPT) -> None:
    schedule = SkipBricks(steps=4, skip_ratio=0.25, count=2, when="late", stages="blocks")
    new, _ = run_passes(program, [schedule], [[tokens]])
    dropped, _ = run_passes(program, [DropBlocks(blocks=(1, 2))], [[tokens]])
    results = [run(new, [tokens, torch.tensor(step)])[0] for step in range(4)]
    assert all(torch.equal(result, gpt(tokens)) for result in results[:3])
    assert torch.equal(results[3], run(dropped, [tokens])[0])


def test_goes_with_quantization_in_both_orders(captured: Program, inputs: list[Tensor]) -> None:
    schedule = SkipBricks(steps=4, masks=tuple(MASKS))
    quantize = QuantizeWeights(bits=8, group_size=4)
    first, _ = run_passes(captured, [schedule, quantize], [inputs])
    second, _ = run_passes(captured, [quantize, schedule], [inputs])
    assert {n for n in first.tensors if "codes" in n} == {n for n in second.tensors if "codes" in n}
    for step in range(4):
        flat = [*inputs, torch.tensor(step)]
        torch.testing.assert_close(run(first, flat), run(second, flat), rtol=0, atol=0)


def test_the_first_brick_stays(captured: Program, inputs: list[Tensor]) -> None:
    _, (step,) = run_passes(captured, [SkipBricks(steps=2, masks=("011", "110"))], [inputs])
    assert step.receipt.skipped == {
        "brick_1": "has nothing to be left out for: the chain begins with it"
    }
    assert step.plan.decisions == {"brick_3": "10"}


def test_a_model_without_estimates_is_left_alone(program: Program, tokens: Tensor) -> None:
    with pytest.raises(NoMatchError, match="skip-bricks changed nothing: it found no stage"):
        run_passes(program, [SkipBricks(steps=2)], [[tokens]])


def test_a_mask_of_another_length_is_refused(captured: Program, inputs: list[Tensor]) -> None:
    with pytest.raises(OptionError, match="a mask of 2 does not fit a chain of 3"):
        run_passes(captured, [SkipBricks(steps=1, masks=("10",))], [inputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "leave nothing out"),
        ({"steps": 4, "skip_ratio": 1.5}, "leave nothing out"),
        ({"steps": 4, "count": 0}, "leave nothing out"),
        ({"steps": 2, "masks": ("11",)}, "do not fit 2 steps"),
        ({"steps": 2, "masks": ("11", "1")}, "do not fit 2 steps"),
        ({"steps": 1, "masks": ("12",)}, "do not fit 1 steps"),
        ({"steps": 1, "when": "never"}, "when=never is not supported"),
        ({"steps": 1, "stages": "floors"}, "stages=floors is not supported"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SkipBricks(**options)


class Steps(nn.Module):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return x * step


def test_an_argument_called_step_must_be_one() -> None:
    program = bw.capture(Steps(), (torch.ones(2), torch.ones(2)))
    with pytest.raises(OptionError, match="something called 'step' already"):
        SkipBricks(steps=2).prepared(program)


def test_an_engine_is_called_with_the_step_and_comes_back_from_a_file(
    captured: Program, lego: Lego, inputs: list[Tensor], tmp_path: Path
) -> None:
    engine = bw.compile(
        lego, [SkipBricks(steps=2, when="late")], example_inputs=tuple(inputs), backend="eager"
    )
    with pytest.raises(OptionError, match="argument 'step' is missing"):
        engine(*inputs)
    engine.save(tmp_path / "lego.bw")
    loaded = bw.load(tmp_path / "lego.bw")
    with torch.no_grad():
        *_, before, last = lego.estimates(*inputs)
        for called in (engine, loaded):
            assert torch.equal(called(*inputs, step=torch.tensor(0)), last)
            assert torch.equal(called(*inputs, torch.tensor(1)), before)
