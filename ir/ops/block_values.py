"""Values and weights in blocks.

block_round         what is left of a value in blocks: on every edge of a compressed model
block_weight        the tensor that stored codes stand for
block_embedding     rows of a table of codes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .block_codes import (
    decode_matrix,
    decode_rows,
    downscale,
    fitted,
    grid_of,
    round_to_blocks,
)


@torch.library.custom_op("blockwright::block_round", mutates_args=())
def block_round(x: Tensor, form: str, block: int, axis: int, pow2: bool) -> Tensor:
    """Round a value to the codes of its blocks.

    Args:
        x: Floating point.
        form: `int8`, `fp8` (e4m3), or `uint8` for probabilities.
        block: Numbers along the axis that share a scale.
        axis: -1 or -2.
        pow2: Whether scales are powers of two.

    Returns:
        A tensor like `x`. Rounding it again changes nothing.
    """
    return round_to_blocks(x, form, block, axis, pow2=pow2).contiguous().clone()


@block_round.register_fake
def _(x: Tensor, form: str, block: int, axis: int, pow2: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("blockwright::block_weight", mutates_args=())
def block_weight(
    x: Tensor, codes: Tensor, shift: Tensor, shape: list[int], bits: int, block: list[int]
) -> Tensor:
    """Return the tensor that codes stand for.

    Args:
        x: Gives the type of the result, nothing else.
        codes: int8 [rows, columns], or uint8 [rows, ceil(columns / 2)] for 4 bits.
        shift: int8 exponents or float scales, one per block.
        shape: Of the result; as a matrix it has as many rows as the codes.
        bits: 8 or 4.
        block: Rows and columns of a block.
    """
    return spell_weight(x, codes, shift, shape, bits, block).clone()


@block_weight.register_fake
def _(
    x: Tensor, codes: Tensor, shift: Tensor, shape: list[int], bits: int, block: list[int]
) -> Tensor:
    return x.new_empty(shape)


@torch.library.custom_op("blockwright::block_embedding", mutates_args=())
def block_embedding(
    ids: Tensor,
    codes: Tensor,
    shift: Tensor,
    columns: int,
    bits: int,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Look up rows of a table of codes.

    Args:
        ids: [*batch], integers within 0..rows-1.
        codes: As of `block_weight`.
        shift: As of `block_weight`.
        columns: Width of the table.
        bits: 8 or 4.
        block: Rows and columns of a block.
        dtype: Type of the result.

    Returns:
        [*batch, columns].
    """
    return spell_embedding(ids, codes, shift, columns, bits, block, dtype)


@block_embedding.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    shift: Tensor,
    columns: int,
    bits: int,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return shift.new_empty((*ids.shape, columns), dtype=dtype)


def spell_round(x: Tensor, form: str, block: int, axis: int, pow2: bool) -> Tensor:
    """`block_round` in ops of ATen."""
    return round_to_blocks(x, form, block, axis, pow2=pow2)


def spell_weight(
    x: Tensor, codes: Tensor, shift: Tensor, shape: list[int], bits: int, block: list[int]
) -> Tensor:
    """`block_weight` in ops of ATen."""
    columns = math.prod(shape) // codes.shape[0]
    matrix = decode_matrix(codes, shift, columns, bits, block)
    return matrix.to(x.dtype).view(shape)


def spell_embedding(
    ids: Tensor,
    codes: Tensor,
    shift: Tensor,
    columns: int,
    bits: int,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`block_embedding` in ops of ATen."""
    rows = decode_rows(codes[ids], columns, bits)
    tall, wide = fitted(block, codes.shape[0], columns)
    factors = downscale(shift)[ids // tall].repeat_interleave(wide, dim=-1)
    return (rows * factors[..., :columns]).to(dtype)


def grid_bytes(rows: int, columns: int, bits: int, block: tuple[int, int], *, pow2: bool) -> int:
    """Return the bytes of a matrix in blocks: its codes, and one or four bytes per block."""
    blocks = math.prod(grid_of(rows, columns, block))
    return rows * -(-columns * bits // 8) + blocks * (1 if pow2 else 4)


def elementwise(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """One FLOP per element of the result."""
    return {"elementwise": math.prod(output)}


def no_weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Nothing is stored."""
    return 0


def weight_size(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return math.prod(output)


def table_size(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights of the table the codes stand for."""
    return shapes[1][0] * output[-1]


def describe_round(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how values are rounded."""
    return "values", f"{arguments['form']} in blocks of {arguments['block']}"


def describe_weight(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the weight is stored."""
    return "weights", stored_as(arguments)


def describe_embedding(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the table is stored."""
    return "embedding tables", stored_as(arguments)


def stored_as(arguments: Mapping[str, Any]) -> str:
    """Name the format of codes: `int4 in blocks of 32 x 32`."""
    rows, columns = arguments["block"]
    return f"int{arguments['bits']} in blocks of {rows} x {columns}"


ROUND = torch.ops.blockwright.block_round.default
WEIGHT = torch.ops.blockwright.block_weight.default
EMBEDDING = torch.ops.blockwright.block_embedding.default
