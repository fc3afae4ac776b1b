"""How operations on blocks become ONNX: standard ops that any runtime has.

    blocks       Pad, Reshape to [..., blocks, width], Reshape, Slice
    shift        Log, Round, and the exponent below where that would be too large
    codes        Round, or Cast to float8e4m3fn
    products     MatMul in double precision, which is exact; integers are refused
    tables       Gather

Stored codes are decoded while a runtime loads the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23 as op

from ..ir.ops import block_product, block_tables, block_values
from ..ir.ops.block_codes import HUGE, LIMITS, PROBABILITY_SHIFT, fitted, grid_of, width_of
from .onnx_values import FLOAT, as_type, dtype_of, ints, scalar, shape_of

DOUBLE: Final = ir.DataType.DOUBLE
_LARGEST_SHIFT: Final = 126


def block_round(x: ir.Value, form: str, block: int, axis: int, pow2: bool) -> ir.Value:
    """Round a value to the codes of its blocks."""
    dtype, wide = dtype_of(x), as_type(x, FLOAT)
    return as_type(_rounded(wide, shape_of(x), form, block, axis, pow2), dtype, given=FLOAT)


def block_weight(
    x: ir.Value,
    codes: ir.Value,
    shift: ir.Value,
    shape: Sequence[int],
    bits: int,
    block: Sequence[int],
) -> ir.Value:
    """Decode a stored tensor."""
    columns = math.prod(shape) // shape_of(codes)[0]
    weight = op.Reshape(_matrix(codes, shift, columns, bits, block), ints(*shape))
    return as_type(weight, dtype_of(x), given=FLOAT)


def block_embedding(
    ids: ir.Value,
    codes: ir.Value,
    shift: ir.Value,
    columns: int,
    bits: int,
    block: Sequence[int],
    dtype: int,
) -> ir.Value:
    """Gather rows of codes and their shifts."""
    rows = _decoded(op.Gather(codes, ids), columns, bits)
    tall, wide = fitted(block, int(shape_of(codes)[0]), columns)
    down = op.Gather(_downscale(shift), op.Div(as_type(ids, ir.DataType.INT64), ints(tall)))
    factors = op.Gather(down, ints(*(column // wide for column in range(columns))), axis=-1)
    return as_type(op.Mul(rows, factors), ir.DataType(dtype), given=FLOAT)


def block_linear(
    x: ir.Value,
    codes: ir.Value,
    shift: ir.Value,
    bias: ir.Value | None,
    bits: int,
    weight_block: Sequence[int],
    form: str,
    block: int,
    integer: bool,
) -> ir.Value:
    """Multiply by the decoded weight."""
    pow2 = dtype_of(shift) == ir.DataType.INT8
    features = int(shape_of(x)[-1])
    weight = op.Transpose(_matrix(codes, shift, features, bits, weight_block), perm=[1, 0])
    rounded = _rounded(as_type(x, FLOAT), shape_of(x), form, block, -1, pow2)
    y = _product(rounded, weight, dtype_of(x), pow2, integer)
    return y if bias is None else op.Add(y, bias)


def block_matmul(
    a: ir.Value, b: ir.Value, a_form: str, b_form: str, block: int, pow2: bool, integer: bool
) -> ir.Value:
    """Multiply two values in blocks."""
    left = _rounded(as_type(a, FLOAT), shape_of(a), a_form, block, -1, pow2)
    right = _rounded(as_type(b, FLOAT), shape_of(b), b_form, block, -2, pow2)
    return _product(left, right, dtype_of(a), pow2, integer)


def block_activation(x: ir.Value, function: str, block: int) -> ir.Value:
    """Look a function up."""
    dtype, wide, (low, high) = dtype_of(x), as_type(x, FLOAT), block_tables.SHIFTS
    codes, shift = _encoded(wide, shape_of(x)[-1], "int8", block, pow2=True)
    row = op.Clip(shift, scalar(low), scalar(high))
    moved = op.Round(op.Mul(codes, _exp2(op.Sub(row, shift))))
    limit = LIMITS["int8"]
    codes = op.Clip(moved, scalar(-limit), scalar(limit))
    place = op.Mul(op.Sub(row, scalar(low)), scalar(2 * limit + 1))
    index = op.Add(op.Add(place, codes), scalar(limit))
    table = block_tables.activation_table(function, torch.zeros(())).flatten()
    entry = op.Cast(_flat(index, wide), to=ir.DataType.INT64)
    found = op.Gather(_constant(table), entry)
    return as_type(op.Where(op.IsNaN(wide), wide, found), dtype, given=FLOAT)


def block_softmax(x: ir.Value, mask: ir.Value | None, causal: bool, scale: float) -> ir.Value:
    """Look exponentials up."""
    dtype, scores = dtype_of(x), op.Mul(as_type(x, FLOAT), scalar(scale))
    if causal:
        rows, columns = (_count(x, axis) for axis in (-2, -1))
        later = op.Greater(columns, op.Unsqueeze(rows, ints(1)))
        scores = op.Where(later, scalar(-math.inf), scores)
    if mask is not None and dtype_of(mask) == ir.DataType.BOOL:
        scores = op.Where(mask, scores, scalar(-math.inf))
    elif mask is not None:
        scores = op.Add(scores, as_type(mask, FLOAT))
    peak = op.ReduceMax(scores, ints(-1), keepdims=1)
    bottom = scalar(float(np.finfo(np.float32).min))
    below = op.Round(op.Mul(op.Sub(op.Max(peak, bottom), scores), scalar(32.0)))
    far = scalar(255.0)
    code = op.Where(op.IsNaN(below), far, op.Clip(below, scalar(0.0), far))
    table = _constant(block_tables.exponential_table(torch.zeros(())))
    weight = op.Gather(table, op.Cast(code, to=ir.DataType.INT64))
    total = op.Max(op.ReduceSum(weight, ints(-1), keepdims=1), scalar(1.0))
    p = op.Where(op.IsNaN(peak), peak, op.Div(weight, total))
    return as_type(p, dtype, given=FLOAT)


TRANSLATIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    block_values.ROUND: block_round,
    block_values.WEIGHT: block_weight,
    block_values.EMBEDDING: block_embedding,
    block_product.LINEAR: block_linear,
    block_product.MATMUL: block_matmul,
    block_tables.ACTIVATION: block_activation,
    block_tables.SOFTMAX: block_softmax,
}


def _rounded(
    x: ir.Value, shape: Sequence[Any], form: str, block: int, axis: int, pow2: bool
) -> ir.Value:
    """Return what codes stand for, of a float value of a shape."""
    if form == "uint8":
        unit = 2.0**PROBABILITY_SHIFT
        return op.Mul(op.Round(op.Mul(x, scalar(unit))), scalar(1 / unit))
    swap = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    across = x if axis == -1 else op.Transpose(x, perm=swap)
    codes, shift = _encoded(across, shape[axis], form, block, pow2=pow2)
    values = op.Mul(codes, _exp2(op.Neg(shift))) if pow2 else op.Div(codes, shift)
    held = op.Less(op.Abs(across), scalar(HUGE))
    rounded = op.Where(held, _flat(values, across), across)
    return rounded if axis == -1 else op.Transpose(rounded, perm=swap)


def _encoded(
    x: ir.Value, size: Any, form: str, block: int, *, pow2: bool
) -> tuple[ir.Value, ir.Value]:
    """Return codes [..., blocks, width] and shifts or factors [..., blocks, 1]."""
    width = width_of(block, size)
    held = op.Where(op.Less(op.Abs(x), scalar(HUGE)), x, scalar(0.0))
    missing = op.Mod(op.Neg(op.Shape(x, start=-1)), ints(width))
    padded = op.Pad(held, op.Concat(ints(0), missing, axis=0), scalar(0.0), ints(-1))
    blocks = op.Reshape(padded, op.Concat(op.Shape(x, end=-1), ints(-1, width), axis=0))
    shift = _shift(op.ReduceMax(op.Abs(blocks), ints(-1), keepdims=1), LIMITS[form], pow2=pow2)
    scaled = op.Mul(blocks, _exp2(shift) if pow2 else shift)
    if form != "fp8":
        return op.Round(scaled), shift
    return op.Cast(op.Cast(scaled, to=ir.DataType.FLOAT8E4M3FN), to=FLOAT), shift


def _shift(peak: ir.Value, limit: float, *, pow2: bool) -> ir.Value:
    safe = op.Where(op.Greater(peak, scalar(0.0)), peak, scalar(limit))
    factor = op.Div(scalar(limit), safe)
    if not pow2:
        return op.Min(factor, scalar(2.0**_LARGEST_SHIFT))
    exponent = op.Round(op.Div(op.Log(factor), scalar(math.log(2))))
    nearest = op.Clip(exponent, scalar(-float(_LARGEST_SHIFT)), scalar(float(_LARGEST_SHIFT)))
    above = op.Greater(op.Mul(safe, _exp2(nearest)), scalar(limit))
    return op.Sub(nearest, op.Cast(above, to=FLOAT))


def _flat(blocks: ir.Value, like: ir.Value) -> ir.Value:
    """Undo the cut into blocks."""
    flat = op.Reshape(blocks, op.Concat(op.Shape(like, end=-1), ints(-1), axis=0))
    return op.Slice(flat, ints(0), op.Shape(like, start=-1), ints(-1))


def _exp2(exponent: ir.Value) -> ir.Value:
    return op.Pow(scalar(2.0), exponent)


def _matrix(
    codes: ir.Value, shift: ir.Value, columns: int, bits: int, block: Sequence[int]
) -> ir.Value:
    rows = int(shape_of(codes)[0])
    tall, wide = fitted(block, rows, columns)
    down, across = grid_of(rows, columns, (tall, wide))
    cells = op.Reshape(_downscale(shift), ints(down, 1, across, 1))
    full = op.Expand(cells, ints(down, tall, across, wide))
    spread = op.Reshape(full, ints(down * tall, across * wide))
    factors = op.Slice(spread, ints(0, 0), ints(rows, columns), ints(0, 1))
    return op.Mul(_decoded(codes, columns, bits), factors)


def _decoded(codes: ir.Value, columns: int, bits: int) -> ir.Value:
    """Return rows of codes as floats."""
    if bits == 8:
        return op.Cast(codes, to=FLOAT)
    byte = ir.DataType.UINT8
    low = op.BitwiseAnd(codes, scalar(15, byte))
    high = op.BitShift(codes, scalar(4, byte), direction="RIGHT")
    pairs = op.Concat(op.Unsqueeze(low, ints(-1)), op.Unsqueeze(high, ints(-1)), axis=-1)
    stored = op.Concat(op.Shape(codes, end=-1), ints(-1), axis=0)
    nibbles = op.Cast(op.Reshape(pairs, stored), to=FLOAT)
    signed = op.Where(op.Greater(nibbles, scalar(7.0)), op.Sub(nibbles, scalar(16.0)), nibbles)
    return op.Slice(signed, ints(0), ints(columns), ints(-1))


def _downscale(shift: ir.Value) -> ir.Value:
    if dtype_of(shift) == ir.DataType.INT8:
        return _exp2(op.Neg(op.Cast(shift, to=FLOAT)))
    return op.Div(scalar(1.0), shift)


def _product(a: ir.Value, b: ir.Value, dtype: ir.DataType, pow2: bool, integer: bool) -> ir.Value:
    if integer:
        raise NotImplementedError("products of integer blocks have no translation")
    if not pow2:
        return as_type(op.MatMul(a, b), dtype, given=FLOAT)
    y = op.MatMul(op.Cast(a, to=DOUBLE), op.Cast(b, to=DOUBLE))
    return op.Cast(y, to=dtype)


def _count(x: ir.Value, axis: int) -> ir.Value:
    """Return the numbers from 0 on, as many as an axis is long."""
    size = op.Gather(op.Shape(x), scalar(axis, ir.DataType.INT64))
    return op.Range(scalar(0, ir.DataType.INT64), size, scalar(1, ir.DataType.INT64))


def _constant(values: torch.Tensor) -> ir.Value:
    return op.Constant(value=ir.tensor(values.numpy()))
