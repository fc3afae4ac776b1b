"""FoldConstants: fires, declines, is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.passes import FoldConstants


def test_golden(program: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [FoldConstants()])
    golden("fold_constants", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_position_table_of_fixed_length_is_folded(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, [FoldConstants()], [[tokens]])
    assert len(step.receipt.changed) == 1
    assert not any("arange" in str(node.target) for node in new.main.nodes)
    assert torch.equal(run(new, [tokens])[0], run(program, [tokens])[0])


class Scaled(nn.Module):
    """Each layer multiplies two weights before it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.gains = nn.ParameterList(torch.full((4, 1), float(i + 1)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = torch.tanh(nn.functional.linear(x, layer.weight * gain, layer.bias))
        return x


def test_products_of_weights_are_folded_per_instance() -> None:
    program = capture(Scaled(), (torch.randn(2, 4),))
    assert len(program.instances) == 3
    new, (step,) = run_passes(program, [FoldConstants()])
    assert len(step.receipt.changed) == 3
    assert not any("gain" in name for name in new.tensors)
    x = torch.randn(2, 4)
    assert torch.equal(run(new, [x])[0], run(program, [x])[0])


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.row.t() @ self.row)


def test_declines_what_would_grow() -> None:
    program = capture(Grows(), (torch.zeros(64, 64),))
    with pytest.raises(NoMatchError, match="grows by 16128 bytes"):
        run_passes(program, [FoldConstants(max_growth_bytes=1000)])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4)


def test_randomness_is_no_constant() -> None:
    with pytest.raises(NoMatchError):
        run_passes(capture(Noisy(), (torch.zeros(4),)), [FoldConstants()])


def test_dynamic_sizes_are_no_constants(gpt: nn.Module) -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0])

    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = capture(Positions(), (torch.zeros(4),), dynamic_shapes=shapes)
    with pytest.raises(NoMatchError):
        run_passes(program, [FoldConstants()])


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="max_growth_bytes=-1 is negative"):
        FoldConstants(max_growth_bytes=-1)


class Waves(nn.Module):
    """Two constants, and the way to both."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(4.0) * 0.5
        return x * angles.cos() + x.flip(0) * angles.sin() + angles


def test_constants_may_share_nodes() -> None:
    x = torch.ones(4)
    program = capture(Waves(), (x,))
    new, (step,) = run_passes(program, [FoldConstants()], [[x]])
    assert len(step.receipt.changed) == 3
    assert "arange" not in new.text()
    assert torch.equal(run(new, [x])[0], Waves()(x))
