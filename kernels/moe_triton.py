"""Feed-forward experts on a GPU: two grouped matrix products in Triton. `pip install triton`.

    tiles     BLOCK_M visits of one expert each; the last tile of an expert may be ragged
    hidden    act(x[token] @ up.T)  or  act(x[token] @ gate.T) * (x[token] @ up.T)      [visits, h]
    answers   (hidden @ down.T) * weight, each written to where its visit stands        [visits, d]
    y         sum of the k answers of a token                                           [tokens, d]

Rows are gathered while they are loaded and scattered while they are stored, gate and up share one
load of x, and sums run in fp32 without atomics, so that results repeat. The grid is as large as the
worst routing needs; no size is read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .experts import Experts


@dataclass(frozen=True)
class Tiles:
    """Which rows of the sorted visits each program takes.

    Attributes:
        expert: [tiles]; the number of experts for a tile with nothing to do.
        start: [tiles], first row.
        stop: [tiles], row after the last one of the expert.
        order: [visits], the visit behind each sorted row.
    """

    expert: Int[Tensor, " tiles"]
    start: Int[Tensor, " tiles"]
    stop: Int[Tensor, " tiles"]
    order: Int[Tensor, " visits"]


def tiles_of(index: Int[Tensor, "tokens k"], experts: int, block: int) -> Tiles:
    """Cut the visits of every expert into tiles of at most `block` rows, on the device."""
    expert, order = index.reshape(-1).sort(stable=True)
    ids = torch.arange(experts, device=index.device)
    stops = torch.searchsorted(expert, ids, right=True)
    starts = torch.searchsorted(expert, ids)
    counts = (stops - starts + block - 1) // block
    ends = counts.cumsum(0)
    tile = torch.arange(triton.cdiv(index.numel(), block) + experts, device=index.device)
    owner = torch.searchsorted(ends, tile, right=True)
    known = owner.clamp(max=experts - 1)
    start = starts[known] + (tile - ends[known] + counts[known]) * block
    kinds = (owner, start, stops[known], order)
    return Tiles(*(each.to(torch.int32) for each in kinds))


@triton.jit  # type: ignore[untyped-decorator]
def activate(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply an activation by name to fp32 values."""
    if KIND == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif KIND == "sigmoid":
        x = tl.sigmoid(x)
    elif KIND == "tanh":
        x = 2 * tl.sigmoid(2 * x) - 1
    else:
        tl.static_assert(KIND == "none", "unknown activation")
    return x


@triton.jit  # type: ignore[untyped-decorator]
def hidden_kernel(  # type: ignore[no-untyped-def]
    x, gate, up, gate_bias, up_bias, hidden, owners, starts, stops, order,
    k, experts, dim, ffn_dim, tiles,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of hidden neurons; a pointer that is None leaves its part out."""
    blocks = tl.cdiv(ffn_dim, BLOCK_N)
    tile, block = tl.swizzle2d(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, tiles, blocks, GROUP
    )
    owner = tl.load(owners + tile).to(tl.int64)
    if owner >= experts:
        return
    row = tl.load(starts + tile) + tl.arange(0, BLOCK_M)
    live = row < tl.load(stops + tile)
    token = (tl.load(order + row, mask=live, other=0) // k).to(tl.int64)
    column, inner = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    kept = column < ffn_dim
    rows = x + token[:, None] * dim + inner[None, :]
    place = (owner * ffn_dim + column[None, :]) * dim + inner[:, None]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pre = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        inside = inner < dim - start
        a = tl.load(rows + start, mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(up + place + start, mask=inside[:, None] & kept[None, :], other=0.0)
        value = tl.dot(a, w, value, input_precision=PRECISION)
        if gate is not None:
            w = tl.load(gate + place + start, mask=inside[:, None] & kept[None, :], other=0.0)
            pre = tl.dot(a, w, pre, input_precision=PRECISION)
    place = owner * ffn_dim + column
    if up_bias is not None:
        value += tl.load(up_bias + place, mask=kept, other=0.0).to(tl.float32)[None, :]
    if gate_bias is not None:
        pre += tl.load(gate_bias + place, mask=kept, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        value = activate(pre, KIND) * value
    else:
        value = activate(value, KIND)
    out = hidden + row[:, None].to(tl.int64) * ffn_dim + column[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & kept[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def answer_kernel(  # type: ignore[no-untyped-def]
    hidden, down, down_bias, weight, answers, owners, starts, stops, order,
    experts, dim, ffn_dim, tiles,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of weighted answers and write each row to its visit."""
    blocks = tl.cdiv(dim, BLOCK_N)
    tile, block = tl.swizzle2d(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, tiles, blocks, GROUP
    )
    owner = tl.load(owners + tile).to(tl.int64)
    if owner >= experts:
        return
    row = tl.load(starts + tile) + tl.arange(0, BLOCK_M)
    live = row < tl.load(stops + tile)
    visit = tl.load(order + row, mask=live, other=0).to(tl.int64)
    column, inner = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    kept = column < dim
    rows = hidden + row[:, None].to(tl.int64) * ffn_dim + inner[None, :]
    place = down + (owner * dim + column[None, :]) * ffn_dim + inner[:, None]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ffn_dim, BLOCK_K):
        inside = inner < ffn_dim - start
        a = tl.load(rows + start, mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(place + start, mask=inside[:, None] & kept[None, :], other=0.0)
        value = tl.dot(a, w, value, input_precision=PRECISION)
    if down_bias is not None:
        bias = tl.load(down_bias + owner * dim + column, mask=kept, other=0.0)
        value += bias.to(tl.float32)[None, :]
    value *= tl.load(weight + visit, mask=live, other=0.0).to(tl.float32)[:, None]
    out = answers + visit[:, None] * dim + column[None, :]
    tl.store(out, value.to(answers.dtype.element_ty), mask=live[:, None] & kept[None, :])


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles, and how a program runs them.

    Attributes:
        m: Rows of a tile.
        n: Columns of a tile.
        k: Elements of a row multiplied at a time.
        warps: Warps of a program.
        stages: Loads in flight.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of the kernels that are known while they are compiled."""
        precision = "ieee" if dtype == torch.float32 else "tf32"  # others have one precision only
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": GROUP}
        return {**sizes, "PRECISION": precision}


GROUP: Final = 8
"""Tiles that share columns of a weight before the next columns are read."""


def blocks_for(dtype: torch.dtype, visits: int, experts: int) -> Blocks:
    """Choose sizes for a mean number of rows per expert."""
    rows = visits / experts
    if dtype == torch.float32:
        return Blocks(16, 64, 32, 4, 3) if rows <= 16 else Blocks(64, 64, 32, 4, 3)
    if rows <= 16:
        return Blocks(16, 128, 128, 4, 3)
    return Blocks(64, 128, 64, 4, 4) if rows <= 96 else Blocks(128, 128, 64, 8, 3)


def moe_ffn(
    x: Float[Tensor, "*tokens dim"],
    index: Int[Tensor, "*tokens k"],
    weight: Float[Tensor, "*tokens k"],
    experts: Experts,
    blocks: Blocks | None = None,
) -> Float[Tensor, "*tokens dim"]:
    """Run experts, in the type of `x`: float32, float16 or bfloat16.

    Args:
        x: Rows.
        index: Experts of each token.
        weight: What each answer is multiplied by.
        experts: Their weights, of the type of `x`.
        blocks: Sizes of tiles; chosen by `blocks_for` when None.
    """
    (count, ffn_dim, dim), k = experts.up.shape, index.shape[-1]
    visits = index.numel()
    if not visits:
        return torch.zeros_like(x)
    blocks = blocks or blocks_for(x.dtype, visits, count)
    tiles = tiles_of(index, count, blocks.m)
    gate, up, up_bias, gate_bias, down, down_bias = (
        None if each is None else each.contiguous() for each in experts.tensors
    )
    hidden, answers = x.new_empty(visits, ffn_dim), x.new_empty(visits, dim)
    shared: dict[str, Any] = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    shared |= blocks.constants(x.dtype)
    table, most = (tiles.expert, tiles.start, tiles.stop, tiles.order), len(tiles.expert)
    hidden_kernel[(most * triton.cdiv(ffn_dim, blocks.n),)](
        x.contiguous(), gate, up, gate_bias, up_bias, hidden, *table,
        k, count, dim, ffn_dim, most, KIND=experts.activation, **shared,
    )  # fmt: skip
    answer_kernel[(most * triton.cdiv(dim, blocks.n),)](
        hidden, down, down_bias, weight.contiguous(), answers, *table,
        count, dim, ffn_dim, most, **shared,
    )  # fmt: skip
    return answers.reshape(*index.shape, dim).sum(dim=-2)
