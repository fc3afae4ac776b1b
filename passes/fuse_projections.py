"""Join linear layers that read the same value into one.

    q = x @ Wq.T      k = x @ Wk.T      v = x @ Wv.T        Wq: [out_q, dim] ...

    q, k, v = split(x @ [Wq; Wk; Wv].T)

One large matrix product runs faster than three small ones, and later passes see one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.facts import Fact
from ..ir.recognize import Projections
from .base import Pass, Promise, Skip, selected


@dataclass(frozen=True, kw_only=True)
class FuseProjections(Pass[Projections, list[int]]):
    """Fuse query, key and value, or gate and up, into one matrix product.

    Attributes:
        include: Glob patterns of module paths to fuse.
        exclude: Glob patterns of module paths to leave alone.

    Source: Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053, section 3 (fused QKV).
    Differs: any layers that read one value are fused, whatever they are used for.
    Exact when: always, up to the order of summation inside the matrix product.
    """

    name: ClassVar[str] = "fuse-projections"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must join"}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def decide(self, region: Projections) -> list[int] | Skip:
        linears = region.linears
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        shared = [linear.label for linear in linears if linear.weight_is_shared]
        if shared:
            return Skip(f"shares the weight of {shared[0]} with another place", at=region)
        if len({linear.weight.dtype for linear in linears}) > 1:
            return Skip("mixes weight types", at=region)
        return [linear.weight.shape[0] for linear in linears]

    def replace(self, region: Projections, sizes: list[int]) -> nn.Module:
        linears = region.linears
        weight = torch.cat([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        return FusedLinear(weight, join_biases(biases, sizes, weight), sizes)


class FusedLinear(nn.Module):
    """Several linear layers in one matrix product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.sizes = list(sizes)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


def join_biases(
    biases: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor
) -> Tensor | None:
    """Concatenate biases, zeros for a layer without one; None when no layer has one."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            like.new_zeros(size) if bias is None else bias
            for bias, size in zip(biases, sizes, strict=True)
        ]
    )
