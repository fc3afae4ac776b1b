"""Numbers in blocks: low-bit codes, and one scale for each block.

    s = floor(log2(limit / max|x|))        q = round(x * 2**s)        x ~ q * 2**-s

A power of two is stored as its exponent, the *shift*; with float scales it is `limit / max|x|`. No
number of a block is ever clamped. What no code can stand for (NaN, infinity, and numbers so large
that they stand for it, as in masks) stays as it is and has no part in the maximum.

Source: Dong and Chen, 2023, arXiv:2304.01483 (one shift per block).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .packing import pack_nibbles

LIMITS: Final = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""Largest code of each format; fp8 is e4m3."""

PROBABILITY_SHIFT: Final = 7
"""Of `uint8`, the format of probabilities: one shift for all, under which 1 is the code 128."""

HUGE: Final = 2.0**125
"""From here on a number stands for infinity; its double is one, so no code can overflow."""

_LARGEST_SHIFT: Final = 126


class Coded(NamedTuple):
    """A tensor in blocks along its last axis.

    Attributes:
        codes: As floats, the axis in blocks: [..., blocks, width].
        shift: Exponents as floats, or factors: [..., blocks, 1].
    """

    codes: Tensor
    shift: Tensor


def round_to_blocks(x: Tensor, form: str, block: int, axis: int = -1, *, pow2: bool) -> Tensor:
    """Return what is left of a tensor in blocks: the values its codes stand for.

    Args:
        x: Floating point.
        form: `int8`, `int4`, `fp8`, or `uint8` for numbers from 0 to 1.
        block: Numbers along the axis that share a scale.
        axis: -1 or -2.
        pow2: Whether scales are powers of two.
    """
    if form == "uint8":
        return torch.round(x * 2.0**PROBABILITY_SHIFT) * 2.0**-PROBABILITY_SHIFT
    across = x if axis == -1 else x.transpose(-1, -2)
    values = _values(encode(across, form, block, pow2=pow2), pow2=pow2)
    rounded = out_of_blocks(values, across.shape[-1]).to(x.dtype)
    held = torch.where(across.abs() < HUGE, rounded, across)
    return held if axis == -1 else held.transpose(-1, -2)


def encode(x: Tensor, form: str, block: int, *, pow2: bool) -> Coded:
    """Return the codes of blocks along the last axis, the last one filled up with zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = torch.where(wide.abs() < HUGE, wide, torch.zeros_like(wide))
    blocks = in_blocks(wide, width_of(block, x.shape[-1]))
    shift = _shift(blocks.abs().amax(-1, keepdim=True), LIMITS[form], pow2=pow2)
    scaled = blocks * (torch.exp2(shift) if pow2 else shift)
    if form == "fp8":
        return Coded(scaled.to(torch.float8_e4m3fn).to(scaled.dtype), shift)
    return Coded(torch.round(scaled), shift)


def in_blocks(x: Tensor, width: int) -> Tensor:
    """Cut the last axis: [..., blocks, width], filled up with zeros.

    While a graph of dynamic size is traced there are two blocks more than fit: a count that may be
    one, or a filling that may be empty, would settle the size.
    """
    size = x.shape[-1]
    if isinstance(size, int):
        count = blocks_in(size, width)
        return F.pad(x, (0, count * width - size)).unflatten(-1, (count, width))
    first = torch.arange(size // width + 2, device=x.device) * width
    place = first[:, None] + torch.arange(width, device=x.device)
    return F.pad(x, (0, 2 * width))[..., place]


def out_of_blocks(blocks: Tensor, size: int) -> Tensor:
    """Undo `in_blocks` for a known size."""
    flat = blocks.flatten(-2)
    if isinstance(size, int):
        return flat[..., :size]
    return flat.index_select(-1, torch.arange(size, device=flat.device))


def width_of(block: int, size: int) -> int:
    """Return the width of blocks of an axis: no wider than the axis, where its size is known."""
    return min(block, max(size, 1)) if isinstance(size, int) else block


def blocks_in(size: int, width: int) -> int:
    """Count the blocks of an axis."""
    return -(-size // width)


def grid_of(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Count the blocks of a matrix, down and across."""
    return blocks_in(rows, block[0]), blocks_in(columns, block[1])


def fitted(block: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """Return blocks no larger than a matrix: one block for all may be asked for as a huge one."""
    return width_of(block[0], rows), width_of(block[1], columns)


def encode_matrix(
    weight: Float[Tensor, "rows columns"], bits: int, block: tuple[int, int], *, pow2: bool
) -> tuple[Tensor, Tensor]:
    """Return stored codes and scales of a matrix in rectangular blocks.

    Returns:
        Codes, int8 [rows, columns], or uint8 [rows, ceil(columns / 2)] for 4 bits, the even column
        in the low nibble; and shifts, int8 [blocks down, blocks across], or float scales.
    """
    rows, columns = weight.shape
    block = fitted(block, rows, columns)
    down, across = grid_of(rows, columns, block)
    padded = F.pad(weight.float(), (0, across * block[1] - columns, 0, down * block[0] - rows))
    peak = padded.abs().view(down, block[0], across, block[1]).amax((1, 3))
    shift = _shift(peak, LIMITS[f"int{bits}"], pow2=pow2)
    up = spread(torch.exp2(shift) if pow2 else shift, rows, columns, block)
    codes = torch.round(weight.float() * up).to(torch.int8)
    if bits == 4:
        codes = pack_nibbles(F.pad(codes, (0, columns % 2))).view(rows, -1)
    return codes, shift.to(torch.int8) if pow2 else shift


def decode_rows(
    codes: Int[Tensor, "*rows stored"], columns: int, bits: int
) -> Float[Tensor, "*rows columns"]:
    """Return stored rows as one code per element, floats."""
    if bits == 8:
        return codes.float()
    nibbles = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)[..., :columns].float()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def decode_matrix(
    codes: Tensor, shift: Tensor, columns: int, bits: int, block: Sequence[int]
) -> Float[Tensor, "rows columns"]:
    """Return the matrix that stored codes stand for."""
    rows = codes.shape[0]
    factors = spread(downscale(shift), rows, columns, fitted(block, rows, columns))
    return decode_rows(codes, columns, bits) * factors


def downscale(shift: Tensor) -> Tensor:
    """Return what codes are multiplied by, from stored shifts or scales."""
    return 1 / shift if shift.is_floating_point() else torch.exp2(-shift.float())


def spread(grid: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """Give every element of a matrix the entry of its block."""
    tall = grid.repeat_interleave(block[0], dim=0)[:rows]
    return tall.repeat_interleave(block[1], dim=1)[:, :columns]


def _shift(peak: Tensor, limit: float, *, pow2: bool) -> Tensor:
    """Return the largest shift, or factor, that takes a peak to the limit at most."""
    safe = torch.where(peak > 0, peak, torch.full_like(peak, limit))
    if not pow2:
        return (limit / safe).clamp(max=2.0**_LARGEST_SHIFT)
    # The logarithm may be off by a rounding, so the nearest exponent is tried, then the one below.
    nearest = torch.round(torch.log2(limit / safe)).clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT)
    return nearest - (safe * torch.exp2(nearest) > limit).to(peak.dtype)


def _values(coded: Coded, *, pow2: bool) -> Tensor:
    return coded.codes * torch.exp2(-coded.shift) if pow2 else coded.codes / coded.shift
