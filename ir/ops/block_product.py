"""Matrix products of blocks, simulated in floating point or in integers.

C = sum_k 2^-(sA_k + sB_k) (qA_k @ qB_k)           qA_k @ qB_k in int32, one product per block of k

Simulated, the values that the codes stand for are multiplied, with shifts in fp64. In integers, the
products of blocks are shifted to one exponent and added in int64. Both give the same bits as long
as fp64 holds every partial sum; for one block along k that is always so, for several if

    inputs * 127^2 * 2^(largest - smallest exponent) < 2^53

Source: Dong and Chen, 2023, arXiv:2304.01483 (block matrix product).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_codes import (
    HUGE,
    PROBABILITY_SHIFT,
    Coded,
    decode_matrix,
    decode_rows,
    encode,
    fitted,
    in_blocks,
    round_to_blocks,
    width_of,
)
from .block_values import stored_as

REACH: Final = 32
"""Exponents further than this above the smallest are rounded: int64 holds 2^20 2^32 1024 terms."""

_EXACT_IN_FP32: Final = 1024  # products of codes in one block of k that fp32 adds without rounding


@torch.library.custom_op("blockwright::block_linear", mutates_args=())
def block_linear(
    x: Tensor,
    codes: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    bits: int,
    weight_block: list[int],
    form: str,
    block: int,
    integer: bool,
) -> Tensor:
    """Apply a linear layer whose weight is stored in blocks to an input in blocks.

    Args:
        x: [*batch, in_features].
        codes: int8 [out_features, in_features], or uint8 with two codes to a byte for 4 bits.
        shift: Exponents (int8) or scales (float) of its blocks.
        bias: [out_features] or None.
        bits: 8 or 4.
        weight_block: Rows and columns of a block of the weight.
        form: Format of the input, `int8` or `fp8`.
        block: Inputs of a row that share a scale.
        integer: Whether integers are multiplied; shifts and `int8` only.

    Returns:
        [*batch, out_features], not rounded to blocks: whoever reads it does that.
    """
    given = (x, codes, shift, bias, bits, weight_block, form, block, integer)
    return spell_linear(*given).contiguous()


@block_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    bits: int,
    weight_block: list[int],
    form: str,
    block: int,
    integer: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("blockwright::block_matmul", mutates_args=())
def block_matmul(
    a: Tensor, b: Tensor, a_form: str, b_form: str, block: int, pow2: bool, integer: bool
) -> Tensor:
    """Multiply two values, both in blocks along the axis that is summed over.

    Args:
        a: [*batch, rows, inner].
        b: [*batch, inner, columns].
        a_form: `int8`, `fp8`, or `uint8` for probabilities.
        b_form: `int8` or `fp8`.
        block: Numbers along `inner` that share a scale.
        pow2: Whether scales are powers of two.
        integer: Whether integers are multiplied; shifts and integer formats only.

    Returns:
        [*batch, rows, columns], not rounded to blocks.
    """
    return spell_matmul(a, b, a_form, b_form, block, pow2, integer).contiguous()


@block_matmul.register_fake
def _(
    a: Tensor, b: Tensor, a_form: str, b_form: str, block: int, pow2: bool, integer: bool
) -> Tensor:
    return torch.matmul(a, b)


def spell_linear(
    x: Tensor,
    codes: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    bits: int,
    weight_block: list[int],
    form: str,
    block: int,
    integer: bool,
) -> Tensor:
    """`block_linear` in ops of ATen."""
    pow2 = not shift.is_floating_point()
    columns = x.shape[-1]
    if integer:
        weight = _weight_columns(codes, shift, columns, bits, weight_block)
        y = _integer_product(encode(x, form, block, pow2=True), weight).to(x.dtype)
        y = y + _unheld(x)
    else:
        matrix = decode_matrix(codes, shift, columns, bits, weight_block)
        rounded = round_to_blocks(x, form, block, pow2=pow2)
        wide = _wide(x, pow2=pow2)
        y = F.linear(rounded.to(wide), matrix.to(wide)).to(x.dtype)
    return y if bias is None else y + bias  # apart from the product, which is exact


def spell_matmul(
    a: Tensor, b: Tensor, a_form: str, b_form: str, block: int, pow2: bool, integer: bool
) -> Tensor:
    """`block_matmul` in ops of ATen."""
    if not integer:
        left = round_to_blocks(a, a_form, block, pow2=pow2)
        right = round_to_blocks(b, b_form, block, axis=-2, pow2=pow2)
        wide = _wide(a, pow2=pow2)
        return (left.to(wide) @ right.to(wide)).to(a.dtype)
    columns = encode(b.transpose(-1, -2), b_form, block, pow2=True)
    product = _integer_product(_rows(a, a_form, block), columns).to(a.dtype)
    return product + _unheld(a) + _unheld(b.transpose(-1, -2)).transpose(-1, -2)


def _wide(x: Tensor, *, pow2: bool) -> torch.dtype:
    """Return the type in which sums of products with shifts are exact; others never are."""
    return torch.float64 if pow2 else x.dtype


def _rows(a: Tensor, form: str, block: int) -> Coded:
    if form != "uint8":
        return encode(a, form, block, pow2=True)
    codes = torch.round(a.float() * 2.0**PROBABILITY_SHIFT)
    blocks = in_blocks(codes, width_of(block, a.shape[-1]))
    return Coded(blocks, torch.full_like(blocks[..., :1], PROBABILITY_SHIFT))


def _weight_columns(
    codes: Tensor, shift: Tensor, columns: int, bits: int, block: Sequence[int]
) -> Coded:
    """Return a stored weight as rows in blocks of inputs."""
    tall, wide = fitted(block, codes.shape[0], columns)
    blocks = in_blocks(decode_rows(codes, columns, bits), wide)
    rows = shift.float().repeat_interleave(tall, dim=0)[: codes.shape[0]]
    return Coded(blocks, rows.unsqueeze(-1))


def _integer_product(a: Coded, b: Coded) -> Tensor:
    """Multiply rows by rows: [*batch, rows, inner] and [*batch, columns, inner], in blocks."""
    width = math.gcd(a.codes.shape[-1], b.codes.shape[-1])
    (qa, sa), (qb, sb) = _matched(_recut(a, width), _recut(b, width))
    exact = torch.float32 if width <= _EXACT_IN_FP32 else torch.float64
    products = (qa.to(exact) @ qb.to(exact).transpose(-1, -2)).long()  # [*batch, parts, rows, cols]
    exponents = (sa + sb.transpose(-1, -2)).long()
    return _aligned_sum(products, exponents)


def _aligned_sum(products: Tensor, exponents: Tensor) -> Tensor:
    """Add `products * 2**-exponents` over the parts, at the largest exponent within reach."""
    low, high = exponents.amin(-3, keepdim=True), exponents.amax(-3, keepdim=True)
    common = torch.minimum(high, low + REACH)
    left = (common - exponents).clamp(min=0)
    right = (exponents - common).clamp(0, 62)
    half = (torch.ones_like(right) << right) >> 1  # round to nearest: plain shifts go down
    total = (((products << left) + half) >> right).sum(-3)
    return total.double() * torch.exp2(-common.squeeze(-3).double())


def _recut(side: Coded, width: int) -> Coded:
    """Cut blocks to narrower parts: codes [*batch, parts, rows, width], shifts [..., rows, 1]."""
    codes, shift = side
    ratio = codes.shape[-1] // width
    if ratio > 1:
        codes = codes.unflatten(-1, (ratio, width)).flatten(-3, -2)
        shift = shift.repeat_interleave(ratio, dim=-2)
    return Coded(codes.transpose(-2, -3), shift.transpose(-2, -3))


def _matched(a: Coded, b: Coded) -> tuple[Coded, Coded]:
    """Leave out the parts that only one of two has: they are filled up with zeros."""
    counts = a.codes.shape[-3], b.codes.shape[-3]
    if counts[0] == counts[1]:
        return a, b
    count = min(counts)
    cut = (Coded(s.codes[..., :count, :, :], s.shift[..., :count, :, :]) for s in (a, b))
    return next(cut), next(cut)


def _unheld(x: Tensor) -> Tensor:
    """Return NaN for rows with numbers that no code stands for, else zero: [..., rows, 1]."""
    lost = (x.abs() < HUGE).all(-1, keepdim=True).logical_not()
    return torch.zeros_like(lost, dtype=x.dtype).masked_fill(lost, math.nan)


def linear_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two operations per multiply-add; rounding to blocks is not counted."""
    return {"linear": 2 * math.prod(output) * shapes[0][-1]}


def matmul_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two operations per multiply-add; rounding to blocks is not counted."""
    return {"attention": 2 * math.prod(output) * shapes[0][-1]}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return shapes[0][-1] * output[-1]


def describe_linear(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the layer multiplies."""
    weight = stored_as({"bits": arguments["bits"], "block": arguments["weight_block"]})
    values = f"{arguments['form']} values in blocks of {arguments['block']}"
    return "linear layers", f"{weight}, {values}"


def describe_matmul(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say what is multiplied."""
    forms = f"{arguments['a_form']} x {arguments['b_form']}"
    return "matrix products", f"{forms} in blocks of {arguments['block']}"


LINEAR = torch.ops.blockwright.block_linear.default
MATMUL = torch.ops.blockwright.block_matmul.default
