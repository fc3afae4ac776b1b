"""What mutants of passes showed to be untested elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.passes import Canonicalize, QuantizeWeights


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class CausalHeads(nn.Module):
    """Causal attention whose key heads are repeated by hand."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_repeated_heads_stay_causal() -> None:
    inputs = (noise(1, 4, 5, 8), noise(1, 2, 5, 8), noise(1, 2, 5, 8))
    program = capture(CausalHeads(), inputs)
    new, (step,) = run_passes(program, [Canonicalize()], [inputs])
    assert len(step.plan.decisions) == 1
    (call,) = (n for n in new.main.nodes if "scaled_dot_product" in str(n.target))
    assert {True} == {v for v in (call.kwargs.get("is_causal"), *call.args[5:6]) if v is not None}


class WideNorm(nn.Module):
    """An RMS norm of fp32 values with a weight in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * self.weight


def test_a_norm_that_mixes_types_is_left_alone() -> None:
    x = noise(3, 8)
    program = capture(WideNorm(), (x,))
    new, (step,) = run_passes(program, [Canonicalize(allow_no_match=True)], [(x,)])
    assert list(step.plan.skips.values()) == ["computes in another type than it reads"]
    assert new.text() == program.text()


def test_the_bound_of_symmetric_codes_is_half_a_step(program: Program) -> None:
    pass_ = QuantizeWeights(group_size=4)
    region = next(r for r in program.regions(Linear) if r.label.endswith(".down"))
    codes = pass_.decide(region)
    module = pass_.replace(region, codes).double()  # type: ignore[arg-type]
    x = noise(3, region.weight.shape[1]).double()
    scale = module.scale.repeat_interleave(4, dim=0)[: x.shape[1]]  # type: ignore[operator]
    bound = pass_.bound(region, module, x)
    assert bound is not None
    torch.testing.assert_close(bound, x.abs() @ scale / 2)


class TwiceMasked(nn.Module):
    """Attention, spelled out, with two numbers added to each score."""

    def forward(self, q: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return torch.softmax(q @ q.transpose(-2, -1) * 0.5 + one + two, dim=-1) @ q


def test_two_masks_are_added() -> None:
    inputs = (noise(1, 2, 3, 4), noise(1, 1, 3, 3), noise(1, 2, 3, 3).abs())
    _, (step,) = run_passes(capture(TwiceMasked(), inputs), [Canonicalize()], [inputs])
    assert len(step.plan.decisions) == 1


class TiledHeads(nn.Module):
    """Attention whose two key heads come twice, one set after the other."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        tiled = k[:, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8)
        return F.scaled_dot_product_attention(q, tiled, tiled)


def test_tiled_heads_are_not_repeated_ones() -> None:
    inputs = (noise(1, 4, 5, 8), noise(1, 2, 5, 8))
    program = capture(TiledHeads(), inputs)
    new, _ = run_passes(program, [Canonicalize(allow_no_match=True)], [inputs])
    assert new.text() == program.text()
