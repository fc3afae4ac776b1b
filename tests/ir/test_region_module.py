"""RegionModule: parts that calls name keep instances in one class, and find free names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.ir.program import Program
from blockwright.ir.recognize import FeedForward
from blockwright.ir.region_module import Call, RegionModule
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scaled(ffn: FeedForward, factor: float, name: str) -> RegionModule:
    """The network with what it returns scaled, in front of its last layer's bias and all."""
    last = ffn.down_layer.node
    assert isinstance(last.target, torch._ops.OpOverload)
    source = last.args[0]
    return RegionModule(ffn, calls={source: Call(name, (source.args[0],))},  # type: ignore[index, union-attr]
                        parts={name: Scaled(factor)})  # fmt: skip


def test_equal_parts_stay_one_class(program: Program, tokens: Tensor) -> None:
    factors = {ffn.label: float(i + 1) for i, ffn in enumerate(program.feed_forwards())}
    new = rewrite(
        program,
        [(ffn, scaled(ffn, factors[ffn.label], "mlp.part")) for ffn in program.feed_forwards()],
        by="test",
    )
    assert len({instance.block for instance in new.instances.values()}) == 1
    held = [t.item() for name, t in new.tensors.items() if name.endswith("mlp.part.factor")]
    assert held == [1, 2, 3]
    assert run(new, [tokens])[0].isfinite().all()


def test_names_that_are_taken_become_others(program: Program) -> None:
    ffn = program.feed_forwards()[0]
    for name in ("inputs.part", "forward", "up.weight"):
        module = scaled(ffn, 2.0, name)
        x = torch.randn(2, 8, 8)
        assert module(x).shape == (2, 8, 8)
        assert sum(p.numel() == 1 for p in module.parameters()) == 1
