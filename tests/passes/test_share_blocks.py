"""Blocks share what they compute with and keep their norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.passes import DropBlocks, QuantizeWeights, ShareBlocks
from blockwright.passes.shared.tying import mean
from blockwright.testing.families import family


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [ShareBlocks()], [[tokens]])
    golden("share_blocks", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def names_of(program: Program, block: str) -> dict[str, str]:
    return dict(program.instances[block].weights)


def test_one_tensor_serves_all_blocks(program: Program) -> None:
    new, _ = run_passes(program, [ShareBlocks()])
    first, second = names_of(new, "blocks.0"), names_of(new, "blocks.1")
    same = {slot for slot in first if first[slot] == second[slot]}
    assert {slot for slot in first if slot not in same} == {s for s in first if "norm" in s}
    slot = "attention.query.weight"
    expected = torch.stack([program.tensors[f"blocks.{i}.{slot}"] for i in range(3)]).mean(dim=0)
    torch.testing.assert_close(new.tensors[first[slot]], expected)
    stored = sum(t.numel() for name, t in new.tensors.items() if name in new.parameters)
    assert stored == new.cost().parameters
    outside = sum(t.numel() for n, t in program.tensors.items()
                  if n in program.parameters and not n.startswith("blocks."))  # fmt: skip
    norms = sum(t.numel() for n, t in program.tensors.items() if "blocks" in n and "norm" in n)
    block = sum(program.tensors[n].numel() for n in names_of(program, "blocks.0").values())
    assert stored == outside + norms + block - norms // 3


def equal_blocks(program: Program) -> Program:
    """Give all blocks the weights of the first, norms apart, in memory of their own."""
    tensors = dict(program.tensors)
    for index in (1, 2):
        for name in names_of(program, f"blocks.{index}").values():
            if "norm" not in name:
                tensors[name] = tensors[name.replace(f".{index}.", ".0.", 1)].clone()
    return program.with_(tensors=tensors)


@pytest.mark.parametrize("start", ["mean", "first", "middle", "last"])
def test_equal_blocks_give_the_same_bits(program: Program, tokens: Tensor, start: str) -> None:
    equal = equal_blocks(program)
    new, _ = run_passes(equal, [ShareBlocks(start=start)], [[tokens]])
    assert torch.equal(run(new, [tokens])[0], run(equal, [tokens])[0])
    assert new.cost().parameters < equal.cost().parameters


def test_one_expert_is_the_network(program: Program, tokens: Tensor) -> None:
    dense, _ = run_passes(program, [ShareBlocks(start="middle")], [[tokens]])
    mixed, _ = run_passes(program, [ShareBlocks(start="middle", experts=1, active=1)], [[tokens]])
    torch.testing.assert_close(run(mixed, [tokens])[0], run(dense, [tokens])[0])


def test_equal_experts_all_active_are_one(program: Program, tokens: Tensor) -> None:
    equal = equal_blocks(program)
    mixed, _ = run_passes(equal, [ShareBlocks(experts=3, active=3)], [[tokens]])
    torch.testing.assert_close(
        run(mixed, [tokens])[0], run(equal, [tokens])[0], rtol=1e-5, atol=1e-6
    )
    assert len({name for i in mixed.instances.values() for name in i.weights.values()
                if "router" in name}) == 1  # fmt: skip


def test_groups_and_parts(program: Program) -> None:
    two, _ = run_passes(program, [ShareBlocks(groups=2, start="first")])
    reads = [names_of(two, f"blocks.{i}")["attention.query.weight"] for i in range(3)]
    assert reads == ["blocks.0.attention.query.weight"] * 2 + ["blocks.2.attention.query.weight"]
    only, _ = run_passes(program, [ShareBlocks(what="feed_forward", start="first")])
    first, last = names_of(only, "blocks.0"), names_of(only, "blocks.2")
    assert first["up.weight"] == last["up.weight"]
    assert first["attention.query.weight"] != last["attention.query.weight"]
    bare, _ = run_passes(program, [ShareBlocks(private_norms=False)])
    assert len({tuple(sorted(i.weights.items())) for i in bare.instances.values()}) == 1


def test_gradients_of_shared_weights_add_up(program: Program, tokens: Tensor) -> None:
    equal = equal_blocks(program)
    new, _ = run_passes(equal, [ShareBlocks()], [[tokens]])
    slot = "up.weight"
    shared, apart = new.module(), equal.module()
    for module in (shared, apart):
        module.requires_grad_(True)
        module(tokens)[0].square().sum().backward()
    name = names_of(new, "blocks.0")[slot]
    total = sum(apart.get_parameter(f"blocks.{i}.{slot}").grad for i in range(3))
    torch.testing.assert_close(shared.get_parameter(name).grad, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "dit"])
def test_other_families(name: str) -> None:
    model = family(name)
    new, (step,) = run_passes(model.program, [ShareBlocks()], [model.inputs])
    assert len(step.receipt.changed) == len(new.blocks())
    assert step.receipt.parameters[1] < step.receipt.parameters[0]


def test_training_moves_shared_weights_and_norms_alone(gpt: GPT, tokens: Tensor) -> None:
    program = bw.capture(gpt, (tokens,))
    new, (step,) = run_passes(program, [ShareBlocks(epochs=20, rate=3e-3)], [[tokens]],
                              calibration=[[tokens], [tokens.flip(0)]])  # fmt: skip
    (training,) = step.receipt.trained
    assert training.kept
    assert training.after < training.before
    kept = [name for name in new.tensors if not name.startswith("blocks.")]
    assert all(new.tensors[name] is program.tensors[name] for name in kept)
    query = {names_of(new, f"blocks.{i}")["attention.query.weight"] for i in range(3)}
    assert len(query) == 1


def test_a_lonely_block_is_left(program: Program, tokens: Tensor) -> None:
    one, _ = run_passes(program, [DropBlocks(blocks=(1, 2))], [[tokens]])
    with pytest.raises(NoMatchError, match="has no other block to share with"):
        run_passes(one, [ShareBlocks()], [[tokens]])


def test_what_is_shared_already_is_refused(program: Program, tokens: Tensor) -> None:
    with pytest.raises(OptionError, match="must tell apart"):
        run_passes(program, [ShareBlocks(private_norms=False), ShareBlocks()], [[tokens]])
    with pytest.raises(OptionError, match="must average"):
        run_passes(program, [QuantizeWeights(), ShareBlocks()], [[tokens]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0"),
        ({"what": "norms"}, "what=norms is not supported"),
        ({"start": "luck"}, "start=luck is not supported"),
        ({"experts": 2, "active": 3}, "3 of 2 experts active"),
        ({"experts": 2, "what": "attention"}, "experts are feed-forward networks"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ShareBlocks(**options)


def test_the_mean_of_equals_is_one_of_them() -> None:
    third = torch.full((3,), 1 / 3)
    assert mean([third, third.clone(), third.clone()]) is third
    assert torch.equal(mean([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]),
                       torch.tensor([2.0, 2.0]))  # fmt: skip
