"""Attention over listed blocks of keys: gathered and multiplied, a few blocks of queries at a time.

    unit       one block of queries of one head, with the blocks of keys it sees
    group      units that see equally many keys, so that nothing has to be masked
    chunk      keys and values of a few units side by side, few enough for the cache

The order of keys does not matter, so each unit lists the shorter last block last, and none behind
it: what it sees are the first keys of what was gathered. Only causal attention needs a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_KEYS: Final = 4096
"""Keys gathered at a time: more do not stay in the cache, fewer make calls too short."""


class Cut(NamedTuple):
    """How queries and keys are cut into blocks, and how they meet.

    Attributes:
        query_block: Queries that see the same blocks.
        key_block: Keys of a block.
        scale: What scores are multiplied by.
        causal: Whether query i sees keys up to `keys - queries + i` only.
    """

    query_block: int
    key_block: int
    scale: float
    causal: bool


class Chunk(NamedTuple):
    """Some units of one group and what they see.

    Attributes:
        units: Which they are.
        blocks: The blocks of keys of each, among those of all heads.
        q: Their queries.
        k: The keys.
        v: The values.
        hidden: Keys a query does not see; None when it sees all of them.
    """

    units: Int[Tensor, " units"]
    blocks: Int[Tensor, "units kept"]
    q: Float[Tensor, "units query_block head_dim"]
    k: Float[Tensor, "units keys head_dim"]
    v: Float[Tensor, "units keys value_dim"]
    hidden: Bool[Tensor, "units query_block keys"] | None


def attend(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    blocks: Int[Tensor, "batch_or_1 heads_or_1 query_blocks kept"],
    cut: Cut,
) -> tuple[Tensor, Tensor]:
    """Return attended values and log-sum-exp; arguments as those of the op."""
    units = Units.of(q, k, v, blocks, cut)
    out = units.q.new_zeros(*units.q.shape[:2], v.shape[-1])
    lse = units.q.new_full(units.q.shape[:2], -math.inf, dtype=_sum_type(q))
    for chunk in units.chunks():
        values, sums = _attend(chunk, cut.scale)
        out.index_copy_(0, chunk.units, values)
        lse.index_copy_(0, chunk.units, sums)
    return _rows(out, q), _rows(lse, q)


def attend_backward(
    grads: tuple[Tensor, Tensor],
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    blocks: Int[Tensor, "batch_or_1 heads_or_1 query_blocks kept"],
    results: tuple[Tensor, Tensor],
    cut: Cut,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; probabilities are computed again.

    With p the probabilities: dv = p.T @ d_out, and the gradient of the scores is
    p * (d_out @ v.T - sum(d_out * out) + d_lse).
    """
    units = Units.of(q, k, v, blocks, cut)
    (out, lse), (d_out, d_lse) = results, grads
    shift = d_lse - (d_out * out).sum(-1, dtype=lse.dtype)
    known = _finite(lse)  # rows that see nothing have no probability anyway
    d_rows, shifts, sums = (_blocks_of(t, cut.query_block) for t in (d_out, shift, known))
    d_q, d_k, d_v = (torch.zeros_like(t, dtype=lse.dtype) for t in (units.q, units.k, units.v))
    for chunk in units.chunks():
        d_chunk, own = d_rows[chunk.units].to(lse.dtype), chunk.units
        p = (_scores(chunk, cut.scale) - sums[own][..., None]).exp()
        d_scores = p * (d_chunk @ chunk.v.mT.to(p.dtype) + shifts[own][..., None]) * cut.scale
        d_q.index_copy_(0, own, d_scores @ chunk.k.to(p.dtype))
        units.scatter(d_k, chunk, d_scores.mT @ chunk.q.to(p.dtype))
        units.scatter(d_v, chunk, p.mT @ d_chunk)
    return _rows(d_q, q).to(q.dtype), _rows(d_k, k).to(k.dtype), _rows(d_v, v).to(v.dtype)


@dataclass(frozen=True)
class Units:
    """Blocks of queries of all heads and samples, and the blocks of keys they see.

    Attributes:
        q: Queries, zeros behind the last one.
        k: Keys, zeros behind the last one.
        v: Their values.
        index: Blocks of keys that a unit sees: full ones, then the short one; what follows is
            anything.
        seen: How many keys that are.
        last_key: The last key that the first query of a unit sees when attention is causal.
        key_blocks: Blocks of keys of one head.
        cut: How all this was cut.
    """

    q: Float[Tensor, "units query_block head_dim"]
    k: Float[Tensor, "key_blocks key_block head_dim"]
    v: Float[Tensor, "key_blocks key_block value_dim"]
    index: Int[Tensor, "units kept"]
    seen: Int[Tensor, " units"]
    last_key: Int[Tensor, " units"]
    key_blocks: int
    cut: Cut

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, cut: Cut) -> Units:
        """Cut queries, keys and values, and sort what each unit sees."""
        (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
        key_blocks = -(-keys // cut.key_block)
        last = key_blocks - 1
        index = blocks.where(blocks >= 0, key_blocks).sort(-1).values
        known = index < key_blocks
        short = (index == last).any(-1) * (key_blocks * cut.key_block - keys)
        seen = known.sum(-1) * cut.key_block - short
        head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
        owner = head // (heads // kv_heads)
        whole = batch, heads, blocks.shape[2]
        first = torch.arange(whole[2], device=q.device) * cut.query_block + (keys - queries)
        return cls(
            q=_blocks_of(q, cut.query_block),
            k=_blocks_of(k, cut.key_block),
            v=_blocks_of(v, cut.key_block),
            index=(owner * key_blocks + index.clamp(max=last)).flatten(0, 2),
            seen=seen.expand(whole).flatten(),
            last_key=first.expand(whole).flatten(),
            key_blocks=key_blocks,
            cut=cut,
        )

    def chunks(self) -> Iterator[Chunk]:
        """Yield all units that see anything, group by group; each chunk is gone with the next."""
        seen, order = self.seen.sort(stable=True)
        lengths, counts = seen.unique_consecutive(return_counts=True)
        groups = order.split(counts.tolist())
        most = max(CHUNK_KEYS // self.cut.key_block, self.index.shape[1])
        memory = [t.new_empty(most, *t.shape[1:]) for t in (self.k, self.v)]
        for length, group in zip(lengths.tolist(), groups, strict=True):
            if length:
                kept = -(-length // self.cut.key_block)
                for units in group.split(max(1, most // kept)):
                    yield self._chunk(units, kept, length, memory)

    def _chunk(self, units: Tensor, kept: int, length: int, memory: list[Tensor]) -> Chunk:
        """Gather what some units see, in memory that is used again and again: it is mapped once."""
        blocks = self.index[units, :kept]

        def gathered(every: Tensor, place: Tensor) -> Tensor:
            near = torch.index_select(every, 0, blocks.flatten(), out=place[: blocks.numel()])
            return near.view(len(units), -1, every.shape[-1])[:, :length]

        k, v = map(gathered, (self.k, self.v), memory)
        hidden = self._hidden(units, blocks)[..., :length] if self.cut.causal else None
        return Chunk(units, blocks, self.q.index_select(0, units), k, v, hidden)

    def _hidden(self, units: Tensor, blocks: Tensor) -> Tensor:
        """Return which keys come later than a query."""
        inside, rows = (torch.arange(n, device=units.device) for n in self.cut[1::-1])
        key = (blocks % self.key_blocks)[..., None] * self.cut.key_block + inside
        last = self.last_key[units][:, None] + rows
        return key.flatten(1)[:, None] > last[..., None]

    def scatter(self, total: Tensor, chunk: Chunk, part: Tensor) -> None:
        """Add gradients of gathered keys to those of their blocks."""
        whole = F.pad(part, (0, 0, 0, -part.shape[1] % self.cut.key_block))
        total.index_add_(0, chunk.blocks.flatten(), whole.reshape(-1, *total.shape[1:]))


def _attend(chunk: Chunk, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to what was gathered."""
    q, k, v = chunk.q, chunk.k, chunk.v
    if q.device.type == "cpu" and chunk.hidden is None and k.shape[-1] == v.shape[-1]:
        heads = (t.unsqueeze(1) for t in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
        return out.squeeze(1), lse.squeeze(1)
    scores = _scores(chunk, scale)
    lse = scores.logsumexp(-1)
    p = (scores - _finite(lse)[..., None]).exp()
    return p.to(v.dtype) @ v, lse


def _scores(chunk: Chunk, scale: float) -> Tensor:
    scores = (chunk.q @ chunk.k.mT).to(_sum_type(chunk.q)) * scale
    return scores if chunk.hidden is None else scores.masked_fill(chunk.hidden, -math.inf)


def _finite(lse: Tensor) -> Tensor:
    """Give rows that see nothing a number that can be subtracted."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _blocks_of(x: Tensor, block: int) -> Tensor:
    """Cut axis 2 into blocks, filled up with zeros, and put all of them behind each other."""
    missing = -x.shape[2] % block
    if missing:  # else padding would copy
        x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, missing))
    return x.reshape(-1, block, *x.shape[3:])


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """Put blocks side by side again, without what they were filled up with."""
    rows = x.reshape(*like.shape[:2], -1, *x.shape[2:])
    return rows[:, :, : like.shape[2]].contiguous()


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
