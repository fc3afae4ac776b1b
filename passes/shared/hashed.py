"""Layers read from tables, and what is made of them.

one layer          tables of all outputs side by side                    dim -> out
extra_bit          dim -> K (bits + extra), norm, K longer tables        -> out
extra_table        dim -> 2 dim, norm, 2 K tables of as many rows        -> out
single             one layer                                             dim -> out

K is dim / bits. There is no activation between two layers: signs after a norm are what one needs.

Source: Ding et al., MemoryFormer, 2024, arXiv:2411.12992, and the code released with it, from which
the sizes of tables at random are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

NETWORKS: Final = ("extra_bit", "extra_table", "single")
TABLE_STD: Final = 0.02
BIAS_STD: Final = 0.001


class HashedLayer(nn.Module):
    """One or more layers that read a value by one hash.

    Args:
        tables: Those of all layers side by side.
        bias: Those of all layers.
        score: A kind of score.
        sizes: Output features of each layer.
    """

    def __init__(
        self,
        tables: Float[Tensor, "tables rows out_features"],
        bias: Float[Tensor, " out_features"],
        score: str,
        sizes: Sequence[int],
    ) -> None:
        super().__init__()
        self.tables = nn.Parameter(tables, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.score, self.sizes = score, list(sizes)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Tensor | tuple[Tensor, ...]:
        y: Tensor = torch.ops.blockwright.hash_linear(x, self.tables, self.bias, self.score)
        return y.split(self.sizes, dim=-1) if len(self.sizes) > 1 else y


class Apart(nn.ModuleList):
    """Layers that read a value by a hash of their own each."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self)


def side_by_side(layers: Sequence[HashedLayer]) -> HashedLayer:
    """Return layers of one value as one that hashes it once."""
    tables = torch.cat([layer.tables for layer in layers], dim=-1)
    bias = torch.cat([layer.bias for layer in layers])
    return HashedLayer(tables, bias, layers[0].score, [n for x in layers for n in x.sizes])


def hashed_network(
    dim: int, out: int, bits: int, extra: int, *, mode: str, score: str, like: Tensor
) -> nn.Module:
    """Return what stands for a feed-forward network, its tables at random.

    Args:
        dim: Width of its input, a multiple of `bits`.
        out: Width of its result.
        bits: Elements of a chunk.
        extra: Bits that the second tables have more, with `extra_bit`.
        mode: One of `NETWORKS`.
        score: A kind of score.
        like: Has type and device of the new weights.
    """
    if mode == "single":
        return random_layer(dim, out, bits, score, like)
    later = bits + extra if mode == "extra_bit" else bits
    hidden = dim // bits * later if mode == "extra_bit" else 2 * dim
    norm = nn.LayerNorm(hidden, device=like.device, dtype=like.dtype).requires_grad_(False)
    first, second = ((dim, hidden, bits), (hidden, out, later))
    parts = {
        "first": random_layer(*first, score, like), "norm": norm,
        "second": random_layer(*second, score, like),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(parts))


def random_layer(
    dim: int, out: int, bits: int, score: str, like: Tensor, std: float = TABLE_STD
) -> HashedLayer:
    """Return a layer whose tables are drawn with a standard deviation."""
    tables, bias = (
        torch.randn(shape, dtype=like.dtype, device=like.device)
        for shape in ((dim // bits, 2**bits, out), (out,))
    )
    return HashedLayer(std * tables, BIAS_STD * bias, score, [out])


def small_std(dim: int) -> float:
    """Return the deviation of tables before an attention.

    Source: Nguyen and Salazar, 2019, arXiv:1910.05895 (small init).
    """
    return math.sqrt(2 / (5 * dim))
