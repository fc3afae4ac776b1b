"""Tables read by hash on a GPU, hash and sum in one Triton kernel. `pip install triton`.

    program   one token, `n` output features
    z         `tables` chunks at a time, `bits` elements each            [tables, bits]
    code      sum of [z >= 0] * 2 ** (bits - 1 - i)                      [tables]
    y        += sum of score * table[code]                               [n]

Tokens address rows of their own, so there is nothing to share between them; what counts is how many
reads are under way at a time. Every program hashes anew, which is little work beside a row. Sums
run in fp32 and in one order, so that results repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles, and how a program runs them.

    Attributes:
        tables: Tables read at a time, a power of two.
        n: Output features of a program, a power of two.
        warps: Warps of a program.
    """

    tables: int
    n: int
    warps: int


def blocks_for(tokens: int, features: int) -> Blocks:
    """Choose sizes: few tokens need many small programs to keep a GPU busy."""
    if tokens * triton.cdiv(features, 256) >= 1024:
        return Blocks(16, 256, 4)
    return Blocks(32, 64, 4)


@triton.jit  # type: ignore[untyped-decorator]
def lookup_kernel(  # type: ignore[no-untyped-def]
    x, tables, bias, y,
    count, features, columns,
    BITS: tl.constexpr, WIDTH: tl.constexpr, L1: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute one tile of one token; `WIDTH` is the power of two from `BITS` on."""
    token = (tl.program_id(0) // columns).to(tl.int64)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    kept, bit, table = column < features, tl.arange(0, WIDTH), tl.arange(0, BLOCK_T)
    power = tl.where(bit < BITS, 1 << tl.maximum(BITS - 1 - bit, 0), 0)
    place = x + token * count * BITS + table[:, None] * BITS + bit[None, :]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, count, BLOCK_T):
        live = table < count - start
        given = live[:, None] & (bit < BITS)[None, :]
        z = tl.load(place + start * BITS, mask=given, other=0.0).to(tl.float32)
        code = tl.sum(tl.where(z >= 0, power[None, :], 0), axis=1)
        size = tl.abs(z)
        # Minus the logarithm of a sigmoid, taken where nothing overflows; 0 beyond the bits.
        doubt = tl.where(given, tl.log(1 + tl.exp(-2 * size)), 0.0)
        score = tl.exp(-tl.sum(doubt, axis=1))
        if L1:
            score *= tl.sum(size, axis=1)
        row = ((start + table).to(tl.int64) << BITS) + code
        rows = tables + row[:, None] * features + column[None, :]
        found = tl.load(rows, mask=live[:, None] & kept[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.where(live, score, 0.0)[:, None] * found, axis=0)
    if bias is not None:
        total += tl.load(bias + column, mask=kept, other=0.0).to(tl.float32)
    tl.store(y + token * features + column, total.to(y.dtype.element_ty), mask=kept)


def hash_linear(
    x: Float[Tensor, "*batch in_features"],
    tables: Float[Tensor, "tables rows out_features"],
    bias: Float[Tensor, " out_features"] | None,
    score: str,
    blocks: Blocks | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Look rows up, in the type of `x`: float32, float16 or bfloat16.

    Args:
        x: What is hashed.
        tables: Of the type of `x`.
        bias: Of the type of `x`.
        score: `l1_softmax` or `softmax`.
        blocks: Sizes of tiles; chosen by `blocks_for` when None.
    """
    (count, _, features), rows = tables.shape, x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(rows), features)
    if not y.numel():
        return y.reshape(*x.shape[:-1], features)
    blocks, bits = blocks or blocks_for(len(rows), features), rows.shape[1] // count
    columns = triton.cdiv(features, blocks.n)
    lookup_kernel[(len(rows) * columns,)](
        rows, tables.contiguous(), bias, y, count, features, columns,
        BITS=bits, WIDTH=triton.next_power_of_2(bits), L1=score == "l1_softmax",
        BLOCK_T=blocks.tables, BLOCK_N=blocks.n, num_warps=blocks.warps,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], features)
