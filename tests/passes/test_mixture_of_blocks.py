"""Each sample runs a few blocks of a group; the others are not computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.branches import choices
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.graphs import aten
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import dit, flux
from blockwright.passes import DropBlocks, MixtureOfBlocks, QuantizeWeights
from blockwright.passes.mixture_of_blocks import Router
from blockwright.testing.families import family


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(dit.DiT(replace(dit.TOY, depth=4)))


@pytest.fixture(scope="module")
def inputs(model: dit.DiT) -> list[Tensor]:
    return list(model.example_inputs(1))


@pytest.fixture(scope="module")
def one(model: nn.Module, inputs: list[Tensor]) -> Program:
    return capture(model, tuple(inputs))


def grouped(program: Program, inputs: Sequence[Tensor], **options: Any) -> Program:
    new, _ = run_passes(program, [MixtureOfBlocks(**options)], [list(inputs)])
    return new


def preferring(program: Program, *wanted: int) -> Program:
    """Let routers go by their biases alone, and prefer some blocks."""
    tensors = dict(program.tensors)
    for name, tensor in tensors.items():
        if "router" in name:
            tensors[name] = torch.zeros_like(tensor)
        if "router.bias" in name:
            tensors[name][list(wanted)] = 1.0
    return program.with_(tensors=tensors)


def test_golden(one: Program, inputs: list[Tensor], golden: Callable[[str, str], None]) -> None:
    pass_ = MixtureOfBlocks(groups=((1, 2),))
    new, (step,) = run_passes(one, [pass_], [inputs])
    golden("mixture_of_blocks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("options", [{"group": 4, "active": 4}, {"group": 2, "active": 2}])
def test_with_all_blocks_active_it_is_the_stack_bit_by_bit(
    one: Program, inputs: list[Tensor], options: dict[str, Any]
) -> None:
    new = grouped(one, inputs, **options)
    assert len(choices(new.main)) == 4
    assert torch.equal(run(new, inputs)[0], run(one, inputs)[0])


@pytest.mark.parametrize("chosen", [(0,), (2,), (1, 3), (0, 1, 2)])
def test_chosen_blocks_run_in_order_and_the_others_are_dropped(
    one: Program, inputs: list[Tensor], chosen: tuple[int, ...]
) -> None:
    new = preferring(grouped(one, inputs, group=4, active=len(chosen)), *chosen)
    others = tuple(index for index in range(4) if index not in chosen)
    dropped, _ = run_passes(one, [DropBlocks(blocks=others)], [inputs])
    assert torch.equal(run(new, inputs)[0], run(dropped, inputs)[0])
    seen: list[Any] = []
    run(new, inputs, on_node=lambda _, node, __: seen.append(node.target))
    assert seen.count(aten.scaled_dot_product_attention.default) == len(chosen)


def test_before_training_all_blocks_score_alike_on_the_calibration(
    one: Program, inputs: list[Tensor]
) -> None:
    sets = [[inputs[0], torch.tensor([time]), inputs[2]] for time in (10.0, 400.0, 900.0)]
    pass_ = MixtureOfBlocks(group=4, active=3, noise=1.0)
    new, (step,) = run_passes(one, [pass_], [inputs], calibration=sets, recover=False)
    assert step.receipt.statistics == {"groups": 1, "blocks run of them": 3}
    topk = next(node for node in new.main.nodes if node.target is aten.topk.default)
    scores: list[Tensor] = []
    for each in sets:
        run(new, each, on_node=lambda _, node, value: scores.append(value)
            if node is topk.args[0] else None)  # fmt: skip
    assert torch.stack(scores).std() > 0.1
    torch.testing.assert_close(torch.stack(scores).mean(0), torch.zeros(1, 4), rtol=0, atol=1e-5)


def test_scores_are_those_of_the_paper_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(1, n, 4, generator=generator) for n in (5, 3))
    y, tokens = torch.randn(1, 6, generator=generator), torch.randn(3, 8, generator=generator)
    told, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    pooled = torch.cat([image.mean(1), text.mean(1)], dim=-1)
    expected = 0.25 * F.linear(pooled, tokens) + 0.75 * F.linear(y, told) + bias
    torch.testing.assert_close(Router(tokens, told, bias, 0.25)([image, text], y), expected)
    alone = Router(tokens, None, bias, 0.25)([image, text], None)
    torch.testing.assert_close(alone, F.linear(pooled, tokens) + bias)


def test_the_choice_follows_the_condition(one: Program, inputs: list[Tensor]) -> None:
    times = (1.0, 40.0, 300.0, 900.0)
    sets = [[inputs[0], torch.tensor([time]), inputs[2]] for time in times]
    pass_ = MixtureOfBlocks(groups=((0, 1),), alpha=0.0)
    new, _ = run_passes(one, [pass_], [inputs], calibration=sets, recover=False)
    taken = []
    for each in sets:
        names: list[str] = []
        run(new, each, on_block=lambda name, _, to=names: to.append(name))
        taken.append(names)
    assert all(names[1:] == ["blocks.2", "blocks.3"] for names in taken)
    assert {names[0] for names in taken} == {"blocks.0", "blocks.1"}


def test_one_router_per_group_and_blocks_stay_what_they_are(
    one: Program, inputs: list[Tensor]
) -> None:
    new = grouped(one, inputs, group=2)
    added = set(new.tensors) - set(one.tensors)
    assert len(added) == 2 * 3
    assert all("router" in name for name in added)
    assert new.instances == one.instances
    dim = 8
    assert new.cost().parameters - one.cost().parameters == 2 * (2 * dim + 2 * dim + 2)


def test_joint_blocks_pool_both_streams_and_stacks_have_groups_of_their_own() -> None:
    model = seeded(flux.Flux(flux.TOY_FLUX))
    x = list(model.example_inputs(1))
    program = capture(model, tuple(x))
    same = grouped(program, x, group=3, active=3)
    assert torch.equal(run(same, x)[0], run(program, x)[0])
    new, (step,) = run_passes(program, [MixtureOfBlocks(group=2)], [x], calibration=[x])
    assert list(step.plan.skips) == [program.blocks()[2].label, program.blocks()[5].label]
    widths = [new.tensors[n].shape[1] for n in new.tensors if "router.tokens" in n]
    assert widths == [32, 16]
    assert step.receipt.trained
    with pytest.raises(OptionError, match=r"the group \[2, 3\] lies across stacks"):
        grouped(program, x, groups=((2, 3),))


def test_training_moves_routers_and_groups_alone(one: Program, inputs: list[Tensor]) -> None:
    sets = [[inputs[0], torch.tensor([time]), inputs[2]] for time in (10.0, 200.0, 500.0, 900.0)]
    pass_ = MixtureOfBlocks(groups=((1, 3),), active=2, epochs=8, rate=3e-3)
    new, (step,) = run_passes(one, [pass_], [inputs], calibration=sets)
    start, _ = run_passes(one, [pass_], [inputs], calibration=sets, recover=False)
    (training,) = step.receipt.trained
    assert training.kept
    assert training.after < training.before
    moved = {n for n in new.tensors if not torch.equal(new.tensors[n], start.tensors[n])}
    assert {name.split(".")[1] for name in moved} == {"1", "2", "3"}
    assert any("router.tokens" in name for name in moved)
    assert any("router.condition" in name for name in moved)


def test_goes_with_quantization_in_both_orders(one: Program, inputs: list[Tensor]) -> None:
    mix, quantize = MixtureOfBlocks(noise=0.0), QuantizeWeights(bits=8, include=("blocks.*",))
    for passes in ([mix, quantize], [quantize, mix]):
        new, _ = run_passes(one, passes, [inputs])
        assert sum("codes" in name for name in new.tensors) >= 16
        torch.testing.assert_close(
            run(new, inputs)[0], run(grouped(one, inputs, noise=0.0), inputs)[0], rtol=0.2, atol=0.2
        )


@pytest.mark.parametrize(
    "backend", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_an_engine_chooses_for_each_call(
    model: nn.Module, one: Program, inputs: list[Tensor], backend: str, tmp_path: Path
) -> None:
    pass_ = MixtureOfBlocks(alpha=0.0, noise=1.0)
    engine = bw.compile(
        model, [pass_], example_inputs=tuple(inputs), backend=backend, recover=False
    )
    reference, _ = run_passes(one, [pass_], [inputs], calibration=[inputs], recover=False)
    for time in (1.0, 40.0, 300.0, 900.0):
        flat = [inputs[0], torch.tensor([time]), inputs[2]]
        torch.testing.assert_close(engine(*flat), run(reference, flat)[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_grouped_is_left(
    one: Program, inputs: list[Tensor], program: Program, tokens: Tensor
) -> None:
    many = family("dit")
    with pytest.raises(NoMatchError, match="the program takes several: capture it with one"):
        grouped(many.program, many.inputs)
    with pytest.raises(NoMatchError, match="would tell it the future"):
        grouped(program, [tokens])
    with pytest.raises(NoMatchError, match="with a block that is excluded by pattern"):
        grouped(one, inputs, group=4, exclude=("blocks.3*",))
    with pytest.raises(NoMatchError, match="fewer blocks are left than make one"):
        grouped(one, inputs, group=5)


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((2, 4),), ((-2, 1),)])
def test_groups_that_are_not_there(
    one: Program, inputs: list[Tensor], groups: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(OptionError, match="does not lie within the 4 blocks"):
        grouped(one, inputs, groups=groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 1}, "a group of 1 leaves nothing to choose"),
        ({"groups": ((0, 2), (3, 3))}, "a group of 1 leaves nothing to choose"),
        ({"group": 3, "active": 4}, "active=4 of a group of 3 blocks"),
        ({"groups": ((0, 1),), "active": 3}, "active=3 of a group of 2 blocks"),
        ({"active": 0}, "active=0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"rate": 0.0}, "rate=0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MixtureOfBlocks(**options)
