"""Fold the weight of a norm into the linear layers that read it.

    y = (n * g + b) @ W.T + c       n: the input, normalised       g, b: [dim]    W: [out, dim]

    y = n @ (W * g).T + (W @ b + c)

The norm keeps no weight, so it commutes with a rotation of the residual stream, and one product
per token and feature is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.ir.facts import Fact
from blockwright.passes import Pass, Promise, Skip
from blockwright.passes.base import selected

from .normed_linears import NormedLinears


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass[NormedLinears, int]):
    """Fold the weights of layer and RMS norms into the linear layers that read them.

    Attributes:
        include: Glob patterns of module paths to fold.
        exclude: Glob patterns of module paths to leave alone.

    Source: SliceGPT, Ashkboos et al., 2024, arXiv:2401.15024, section 3.2; QuaRot, Ashkboos et al.,
        2024, arXiv:2404.00456, section 4.
    Differs: the mean that a layer norm subtracts stays in the norm; only weights move.
    Exact when: always, up to the rounding of one product per weight.
    """

    name: ClassVar[str] = "fold-norms"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must scale"}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def decide(self, region: NormedLinears) -> int | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        norm, linears = region.norm, region.linears
        if norm.weight is None:
            return Skip("has no weight to fold", at=region)
        if norm.written_out:
            return Skip("is spelled out in several ops; canonicalize first", at=region)
        if len(region.outputs) > len(linears):
            return Skip("is read by something other than linear layers", at=region)
        shared = [linear.label for linear in linears if linear.weight_is_shared]
        if shared:
            return Skip(f"is read by {shared[0]}, whose weight is shared", at=region)
        if {linear.weight.dtype for linear in linears} != {norm.weight.dtype}:
            return Skip("mixes weight types", at=region)
        return len(linears)

    def replace(self, region: NormedLinears, decision: int) -> nn.Module:
        norm = region.norm
        assert norm.weight is not None
        layers = [
            FoldedLinear(*fold(norm.weight, norm.bias, linear.weight, linear.bias))
            for linear in region.linears
        ]
        return BareNorm(norm.form, norm.size, norm.eps, layers)


class BareNorm(nn.Module):
    """A norm without weights, and the linear layers behind it."""

    def __init__(
        self, form: str, size: int, eps: float | None, layers: Sequence[FoldedLinear]
    ) -> None:
        super().__init__()
        self.form, self.size, self.eps = form, size, eps
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.form == "rms_norm":
            normal = F.rms_norm(x, [self.size], eps=self.eps)
        else:
            normal = F.layer_norm(x, [self.size], eps=self.eps or 0.0)
        results = tuple(layer(normal) for layer in self.layers)
        return results if len(results) > 1 else results[0]


class FoldedLinear(nn.Module):
    """A linear layer that does the scaling of a norm as well."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, normal: Tensor) -> Tensor:
        return F.linear(normal, self.weight, self.bias)


def fold(
    gain: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, dim] and bias [out] of a layer that does a norm's scaling as well.

    Args:
        gain: What the norm multiplies by, [dim].
        shift: What it adds, [dim].
        weight: Of the layer that reads it, [out, dim].
        bias: Of that layer, [out].
    """
    if shift is not None:
        moved = weight @ shift
        bias = moved if bias is None else bias + moved
    return weight * gain, bias
