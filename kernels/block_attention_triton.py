"""Attention over listed blocks of keys on a GPU, in Triton. `pip install triton`.

    program    some rows of one block of queries of one head
    loop       the blocks listed for it, BLOCK_N keys at a time, with a running peak and total

Keys and values are read where they are; what is not listed is not read. Peaks are kept in base 2,
the scale of the scores times log2(e), so that exponentials are `exp2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .block_attention import Cut

LOG2_E: Final = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(  # type: ignore[no-untyped-def]
    q, k, v, blocks, counts, out, lse,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row,
    blocks_sample, blocks_head, counts_sample, counts_head,
    heads, group, queries, keys, query_block, key_block, kept, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M rows of one block of queries; scores are in base 2."""
    parts = tl.cdiv(query_block, BLOCK_M)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    inner, wide, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    local = part * BLOCK_M + tl.arange(0, BLOCK_M)
    row = block * query_block + local
    live = (local < query_block) & (row < queries)
    rows = q + sample * q_sample + head * q_head + row[:, None].to(tl.int64) * q_row
    query = tl.load(
        rows + inner[None, :], mask=live[:, None] & (inner < HEAD_DIM)[None, :], other=0.0
    )
    k += sample * k_sample + head // group * k_head
    v += sample * v_sample + head // group * v_head
    listed = blocks + sample * blocks_sample + head * blocks_head + block * kept
    count = tl.load(counts + sample * counts_sample + head * counts_head + block)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    steps = tl.cdiv(key_block, BLOCK_N)
    for step in range(count * steps):
        start = step % steps * BLOCK_N
        place = tl.load(listed + step // steps) * key_block + start + column
        there = (start + column < key_block) & (place < keys)
        key = tl.load(
            k + place[None, :].to(tl.int64) * k_row + inner[:, None],
            mask=there[None, :] & (inner < HEAD_DIM)[:, None], other=0.0,
        )  # fmt: skip
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] <= row[:, None] + (keys - queries))
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            v + place[:, None].to(tl.int64) * v_row + wide[None, :],
            mask=there[:, None] & (wide < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        values = values * shrink[:, None]
        values = tl.dot(weight.to(value.dtype), value, values, input_precision=PRECISION)
        peak = higher
    divisor = tl.where(total == 0, 1.0, total)
    values = values / divisor[:, None]
    to = (tl.program_id(1).to(tl.int64) * queries + row)[:, None] * VALUE_DIM + wide[None, :]
    tl.store(
        out + to, values.to(out.dtype.element_ty),
        mask=live[:, None] & (wide < VALUE_DIM)[None, :],
    )  # fmt: skip
    sums = (peak + tl.log2(divisor)) * 0.6931471805599453  # ln(2)
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + row, sums, mask=live)


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, and how a program runs them.

    Attributes:
        m: Queries of a program.
        n: Keys multiplied at a time.
        warps: Warps of a program.
        stages: Loads in flight.
    """

    m: int
    n: int
    warps: int
    stages: int


def tiles_for(dtype: torch.dtype, head_dim: int, cut: Cut) -> Tiles:
    """Choose tiles for blocks of a size and heads of a width."""
    most_m, most_n = (64, 32) if dtype == torch.float32 else (128, 64)
    if head_dim > 128:
        most_m, most_n = most_m // 2, most_n // 2
    m = min(max(triton.next_power_of_2(cut.query_block), 16), most_m)
    n = min(max(triton.next_power_of_2(cut.key_block), 16), most_n)
    return Tiles(m, n, warps=8 if m > 64 else 4, stages=3 if head_dim <= 128 else 2)


def constants(q: Tensor, v: Tensor, cut: Cut, tiles: Tiles) -> dict[str, Any]:
    """Return the arguments of the kernel that are known while it is compiled."""
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "CAUSAL": cut.causal,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # others have one only
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "BLOCK_V": max(triton.next_power_of_2(value_dim), 16),
    }


def attend(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    blocks: Int[Tensor, "batch_or_1 heads_or_1 query_blocks kept"],
    cut: Cut,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attended values and log-sum-exp, in float32, float16 or bfloat16; as the op.

    Args:
        q: Queries.
        k: Keys, of the type of `q`.
        v: Values, of the type of `q`.
        blocks: Blocks of keys of each block of queries, -1 for none.
        cut: How blocks are cut.
        tiles: Sizes of tiles; chosen by `tiles_for` when None.
    """
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(batch, heads, queries, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    listed = blocks.sort(dim=-1, descending=True).values.to(torch.int32)  # -1 comes last
    counts = (blocks >= 0).sum(-1, dtype=torch.int32)
    samples, owners, query_blocks, kept = blocks.shape
    steps = (query_blocks * (owners if samples > 1 else 0), query_blocks * (owners > 1))
    tiles = tiles or tiles_for(q.dtype, head_dim, cut)
    grid = query_blocks * triton.cdiv(cut.query_block, tiles.m), batch * heads
    if out.numel():
        attend_kernel[grid](
            q, k, v, listed, counts, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(step * kept for step in steps), *steps,
            heads, heads // kv_heads, queries, keys, *cut[:2], kept,
            cut.scale * LOG2_E, **constants(q, v, cut, tiles),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, lse
