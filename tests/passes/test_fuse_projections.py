"""FuseProjections: fires, declines, is exact, refuses bad recipes."""

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
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.fuse_projections import FusedLinear


def test_golden(program: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [FuseProjections()])
    golden("fuse_projections", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_fires_once_per_attention(program: Program) -> None:
    _, (step,) = run_passes(program, [FuseProjections()])
    assert step.receipt.changed == tuple(f"blocks.{i}.attention.query_key_value" for i in range(3))


def integers(program: Program) -> Program:
    """Small integer weights, for which every fp32 sum is exact."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-2, 3, tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in program.tensors.items()
    }
    return program.with_(tensors=tensors)


class Split(nn.Module):
    """Three layers of different width that read one value."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(4, out, bias=bias) for out, bias in zip((3, 1, 5), biases, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (True, False, True)])
def test_integers_agree_bitwise(biases: tuple[bool, bool, bool]) -> None:
    program = integers(capture(Split(biases), (torch.zeros(6, 4),)))
    new, _ = run_passes(program, [FuseProjections()])
    x = torch.randint(-2, 3, (6, 4)).float()
    for ours, theirs in zip(run(new, [x]), run(program, [x]), strict=True):
        assert torch.equal(ours, theirs)


def test_promise_holds_on_floats(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [FuseProjections()], [[tokens]])
    assert step.certificate is not None
    (error,) = step.certificate.outputs.values()
    assert error.new is not None
    assert error.new < 1e-6
    assert max(step.certificate.blocks.values()) < 1e-6


class SharedQueryKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.key.weight = self.query.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) * self.key(x)


def test_declines_a_shared_weight() -> None:
    program = capture(SharedQueryKey(), (torch.zeros(2, 4),))
    with pytest.raises(NoMatchError, match="shares the weight of query"):
        run_passes(program, [FuseProjections()])


def test_declines_by_pattern(program: Program) -> None:
    _, (step,) = run_passes(program, [FuseProjections(exclude=("blocks.1.*",))])
    assert step.receipt.skipped == {"blocks.1.attention.query_key_value": "is excluded by pattern"}
    assert len(step.receipt.changed) == 2


def test_nothing_to_fuse_is_an_error_unless_allowed(program: Program) -> None:
    fused, _ = run_passes(program, [FuseProjections()])
    with pytest.raises(NoMatchError, match="found no projections"):
        run_passes(fused, [FuseProjections()])
    again, (step,) = run_passes(fused, [FuseProjections(allow_no_match=True)])
    assert again is fused
    assert not step.receipt.changed


def test_order_is_checked_before_anything_runs(program: Program) -> None:
    with pytest.raises(OptionError, match=r"packs the weights that fuse-projections must join"):
        run_passes(program, [QuantizeWeights(), FuseProjections()])


def test_module_alone() -> None:
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(2, 5, 4)
    a, b = FusedLinear(weight, bias, [2, 4])(x)
    torch.testing.assert_close(torch.cat([a, b], -1), x @ weight.T + bias)
