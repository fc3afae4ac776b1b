"""Folding: which blocks share a graph, and which must not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.ir.verify import verify


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module, keep: bool = False) -> None:
        super().__init__()
        self.blocks, self.keep = nn.ModuleList(blocks), keep

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return seen if self.keep else x


def captured(model: nn.Module) -> Program:
    x = torch.randn(3, 4)
    program = capture(model.eval(), (x,))
    verify(program)
    flat = capture(model, (x,), fold=False)
    for ours, theirs in zip(run(program, [x]), run(flat, [x]), strict=True):
        assert torch.equal(ours, theirs)
    return program


def classes(program: Program) -> list[str]:
    return [instance.block for instance in program.instances.values()]


def test_equal_blocks_share_one_graph() -> None:
    program = captured(Chain(*(Block(4, 8) for _ in range(5))))
    assert classes(program) == ["block0"] * 5
    assert list(program.instances) == [f"blocks.{i}" for i in range(5)]


def test_two_stacks_of_different_width() -> None:
    program = captured(Chain(*(Block(4, 8) for _ in range(3)), *(Block(4, 6) for _ in range(3))))
    assert classes(program) == ["block0"] * 3 + ["block1"] * 3


def test_alternating_blocks_repeat_as_pairs() -> None:
    model = Chain(*(Block(4, 8 if i % 2 else 6) for i in range(6)))
    assert len(set(classes(captured(model)))) == 1
    assert len(captured(model).instances) == 3


def test_a_block_with_another_constant_is_no_member() -> None:
    blocks = [Block(4, 8) for _ in range(4)]
    blocks[2] = Block(4, 8, eps=1e-3)
    program = captured(Chain(*blocks))
    assert "blocks.2" not in program.instances


def test_tied_weights_inside_some_blocks_split_the_class() -> None:
    blocks = [Block(4, 4) for _ in range(4)]
    for block in blocks[2:]:
        block.down.weight = block.up.weight
    program = captured(Chain(*blocks))
    assert classes(program)[:2] != classes(program)[2:]


def test_every_block_output_may_be_read_outside() -> None:
    program = captured(Chain(*(Block(4, 8) for _ in range(4)), keep=True))
    assert len(program.instances) == 4


def test_nothing_repeats() -> None:
    assert not captured(Chain(Block(4, 8), Block(4, 6))).instances


class Conditioned(nn.Module):
    """Every block reads the residual stream and one shared condition."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(4, 4)
        self.scales = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.blocks = nn.ModuleList(Block(4, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        c = torch.tanh(self.condition(x))
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x = x * scale(c)
            x = block(x)
        return x


def test_a_shared_condition_is_an_input_of_every_block() -> None:
    program = captured(Conditioned())
    assert len(program.instances) == 4
    inputs = [n for n in program.graphs["block0"].nodes if n.op == "placeholder"]
    assert len(inputs) == 2


class Parallel(nn.Module):
    """Three projections of one value, alike and not in a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x).view(3, 2, 2).transpose(1, 2).tanh() for layer in self.layers]
        return torch.cat(parts)


def test_parallel_projections_are_no_blocks() -> None:
    assert not captured(Parallel()).instances
