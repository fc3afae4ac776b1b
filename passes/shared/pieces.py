"""Attention in pieces: few blocks of keys exactly, the others by an expansion around their means.

    exp(s q.k_j)  ~  exp(a_n) (1 + s q.(k_j - mean_n))            a_n = s q.mean_n,  j in block n
    sum over j of exp(s q.k_j) v_j  ~  exp(a_n) (V_n + s q H_n)   V_n = sum of v_j
    sum over j of exp(s q.k_j)      ~  exp(a_n) |B_n|             H_n = sum of (k_j - mean_n).T v_j

`zeroth` leaves H_n out; `hybrid` takes one matrix for all blocks, |B_n| / keys times the sum of all
H_n; `first_block` takes each its own, which reads as much as dense attention does, and is there for
comparison. So the rest is attention over one key per block, as heavy as the block is long.

Source: Li et al., PISA, 2026, arXiv:2602.01077.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .partial_attention import Partial, attend, merge, sum_type

ORDERS: Final = ("hybrid", "zeroth", "first_block", "drop")
SELECTIONS: Final = ("mean", "covariance")
REFERENCES: Final = ("zero", "mean")
_EPSILON: Final = 1e-5  # of the logarithm of a covariance


@dataclass(frozen=True)
class Pieces:
    """How much of an attention is exact, and what becomes of the rest.

    Attributes:
        block_size: Tokens of a block; the last one may be shorter.
        kept: Blocks of keys that a block of queries attends to exactly, forced ones included.
        order: What becomes of the others.
        selection: What chooses them: the score of the mean key alone, or with the covariance of
            keys and values of a block.
        cov_ref: What a covariance is compared with: `zero`, or the `mean` of all blocks.
        first: So many blocks of keys at the beginning are always exact.
        last: Whether the last one is.
        scale: What scores are multiplied by.
    """

    block_size: int
    kept: int
    order: str
    selection: str
    cov_ref: str
    first: int
    last: bool
    scale: float


def piecewise(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    pieces: Pieces,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attend in pieces."""
    stats = Statistics.of(k, v, pieces)
    index = select(q, stats, pieces)
    block, scale = pieces.block_size, pieces.scale
    exact = Partial(*torch.ops.blockwright.block_attention(q, k, v, index, block, block, scale))
    if pieces.order == "drop":
        return exact.out
    return merge(exact, rest(q, stats, index, pieces)).out


@dataclass(frozen=True)
class Statistics:
    """What is known of blocks of keys.

    Attributes:
        sizes: Keys of each block.
        key: Mean keys.
        value: Mean values.
        moment: H_n; None when nothing needs them one by one.
        total: The sum of all H_n.
    """

    sizes: Float[Tensor, " blocks"]
    key: Float[Tensor, "batch kv_heads blocks head_dim"]
    value: Float[Tensor, "batch kv_heads blocks value_dim"]
    moment: Float[Tensor, "batch kv_heads blocks head_dim value_dim"] | None
    total: Float[Tensor, "batch kv_heads head_dim value_dim"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, pieces: Pieces) -> Statistics:
        """Look at all keys and values once."""
        keys, values = (blocks_of(x, pieces.block_size) for x in (k, v))
        start = torch.arange(keys.shape[2], device=k.device) * pieces.block_size
        sizes = (k.shape[2] - start).clamp(max=pieces.block_size).to(sum_type(k))
        key, value = (x.sum(-2, dtype=sizes.dtype) / sizes[:, None] for x in (keys, values))
        apart = (keys - key[..., None, :]).to(k.dtype)  # zeros behind the keys meet values of zero
        moment = None
        if pieces.order == "first_block" or pieces.selection == "covariance":
            moment = (apart.mT @ values).to(sizes.dtype)
            total = moment.sum(2)
        else:
            total = (apart.flatten(2, 3).mT @ values.flatten(2, 3)).to(sizes.dtype)
        return cls(sizes, key.to(k.dtype), value.to(v.dtype), moment, total)


def select(q: Tensor, stats: Statistics, pieces: Pieces) -> Int[Tensor, "batch heads blocks kept"]:
    """Choose the blocks of keys that each block of queries attends to exactly."""
    mean = blocks_of(q, pieces.block_size).sum(-2, dtype=stats.sizes.dtype) / stats.sizes[:, None]
    copies = q.shape[1] // stats.key.shape[1]
    key = stats.key.repeat_interleave(copies, dim=1).mT
    scores = (mean.to(q.dtype) @ key).to(mean.dtype) * pieces.scale
    if pieces.selection == "covariance":
        assert stats.moment is not None
        shift = stats.moment.mean(2, keepdim=True) if pieces.cov_ref == "mean" else 0.0
        spread = (stats.moment - shift).flatten(3).square().sum(-1).sqrt()
        spread = (spread + _EPSILON).log().repeat_interleave(copies, dim=1)
        scores = scores + spread[:, :, None]
    if pieces.first or pieces.last:
        number = torch.arange(scores.shape[-1], device=q.device)
        forced = (number < pieces.first) | (number >= scores.shape[-1] - pieces.last)
        scores = scores.masked_fill(forced, math.inf)
    return scores.topk(pieces.kept, dim=-1).indices


def rest(q: Tensor, stats: Statistics, index: Tensor, pieces: Pieces) -> Partial:
    """Attend to the blocks that were not chosen, as if each were its mean, and correct for that."""
    heads, tokens = q.shape[1], q.shape[2]
    copies, count = heads // stats.key.shape[1], stats.key.shape[2]
    key, value, total = (
        x.repeat_interleave(copies, dim=1) for x in (stats.key, stats.value, stats.total)
    )
    chosen = stats.sizes.new_zeros(*index.shape[:3], count).scatter(-1, index, -math.inf)
    bias = (chosen + stats.sizes.log()).repeat_interleave(pieces.block_size, dim=2)[:, :, :tokens]
    if pieces.order == "zeroth":
        return attend(q, key, value, pieces.scale, bias)
    if pieces.order == "hybrid":
        found = attend(q, key, value, pieces.scale, bias)
        change = q @ (total / tokens).to(q.dtype)
        return Partial(found.out + pieces.scale * change, found.lse)
    assert stats.moment is not None
    moment = (stats.moment / stats.sizes[:, None, None]).to(q.dtype)
    wide = torch.cat((value, moment.flatten(3).repeat_interleave(copies, dim=1)), dim=-1)
    found = attend(q, key, wide, pieces.scale, bias)
    out, slopes = found.out.split((value.shape[-1], moment[0, 0, 0].numel()), dim=-1)
    change = (q[..., None, :] @ slopes.unflatten(-1, moment.shape[-2:])).squeeze(-2)
    return Partial(out + pieces.scale * change, found.lse)


def blocks_of(x: Tensor, block_size: int) -> Float[Tensor, "batch heads blocks block_size dim"]:
    """Cut tokens into blocks, the last one filled up with zeros."""
    missing = -x.shape[2] % block_size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, block_size))
