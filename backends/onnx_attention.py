"""How attention over listed blocks of keys becomes ONNX: standard ops that any runtime has.

    keys      [batch, heads, query_blocks, kept * key_block, head_dim]      Gather of whole blocks
    scores    query blocks @ keys.T, minus infinity where there is no key   MatMul, Add
    out       exp(scores - peak) @ values / total                           MatMul
    lse       peak + log(total)

Blocks that are not listed are neither read nor multiplied. All that is gathered lies in memory at
once: as much as the scores of the keys that are seen, times `head_dim / query_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import onnx_ir as ir
from onnxscript import opset23 as op

from ..ir.ops import block_attention as _block
from .onnx_values import FLOAT, as_type, dtype_of, ints, scalar, shape_of

INT64 = ir.DataType.INT64
_LOWEST = -1e37  # stands for the largest score of a query that sees nothing
_TINY = 1e-37  # and for the sum of its exponentials


def block_attention(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    blocks: ir.Value,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool = False,
) -> tuple[ir.Value, ir.Value]:
    """Gather blocks of keys and values for every block of queries, and attend to them."""
    dtype, exact = dtype_of(q), ir.DataType.DOUBLE
    exact = exact if dtype == exact else FLOAT
    index = _among_all_heads(blocks, q, k, key_block)
    rows = op.Reshape(_padded(q, query_block), ints(0, 0, -1, query_block, shape_of(q)[-1]))
    rows = op.Mul(rows, scalar(scale, dtype))
    keys, values = (_gathered(x, index, key_block) for x in (k, v))
    scores = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 2, 4, 3]))
    place = _places(blocks, key_block)
    hidden = _hidden(place, q, k, query_block, causal=causal)
    scores = op.Add(as_type(scores, exact, given=dtype), _bias(hidden, exact))
    last = ints(-1)
    peak = op.Max(op.ReduceMax(scores, last), scalar(_LOWEST, exact))
    weights = op.Exp(op.Sub(scores, peak))
    total = op.ReduceSum(weights, last)
    out = op.MatMul(as_type(weights, dtype, given=exact), values)
    shares = as_type(op.Max(total, scalar(_TINY, exact)), dtype, given=exact)
    lse = op.Squeeze(op.Add(peak, op.Log(total)), last)
    return _rows(op.Div(out, shares), q, shape_of(v)[-1]), _rows(lse, q)


def _among_all_heads(blocks: ir.Value, q: ir.Value, k: ir.Value, key_block: int) -> ir.Value:
    """Return [batch, heads, query_blocks, kept], numbers among the blocks of all key heads."""
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    sample = op.Range(scalar(0, INT64), op.Squeeze(_size(q, 0)), scalar(1, INT64))
    own = ints(*(head * kv_heads // heads for head in range(heads)))
    owner = op.Add(op.Mul(op.Unsqueeze(sample, ints(1)), ints(kv_heads)), own)
    count = op.Div(op.Add(_size(k, 2), ints(key_block - 1)), ints(key_block))
    first = op.Unsqueeze(op.Mul(owner, count), ints(2, 3))
    return op.Add(op.Max(blocks, ints(0)), first)


def _gathered(x: ir.Value, index: ir.Value, key_block: int) -> ir.Value:
    """Return [batch, heads, query_blocks, kept * key_block, width]."""
    width = shape_of(x)[-1]
    whole = op.Reshape(_padded(x, key_block), ints(-1, key_block * width))
    return op.Reshape(op.Gather(whole, index), ints(0, 0, 0, -1, width))


def _places(blocks: ir.Value, key_block: int) -> ir.Value:
    """Return where each gathered key stands; before the first one where there is none."""
    start = op.Mul(op.Unsqueeze(blocks, ints(-1)), ints(key_block))
    return op.Reshape(op.Add(start, ints(*range(key_block))), ints(0, 0, 0, -1))


def _hidden(
    place: ir.Value, q: ir.Value, k: ir.Value, query_block: int, *, causal: bool
) -> ir.Value:
    """Return which gathered keys no query of a block sees, or which query does not."""
    missing = op.Or(op.Less(place, ints(0)), op.GreaterOrEqual(place, _size(k, 2)))
    missing = op.Unsqueeze(missing, ints(-2))
    if not causal:
        return missing
    padded = op.Add(_size(q, 2), _missing(q, query_block))
    row = op.Range(scalar(0, INT64), op.Squeeze(padded), scalar(1, INT64))
    last = op.Add(row, op.Sub(_size(k, 2), _size(q, 2)))
    last = op.Reshape(last, ints(1, 1, -1, query_block, 1))
    return op.Or(missing, op.Greater(op.Unsqueeze(place, ints(-2)), last))


def _bias(hidden: ir.Value, dtype: ir.DataType) -> ir.Value:
    return op.Where(hidden, scalar(float("-inf"), dtype), scalar(0, dtype))


def _padded(x: ir.Value, block: int) -> ir.Value:
    """Fill axis 2 up with zeros to whole blocks."""
    size = shape_of(x)[2]
    if isinstance(size, int) and size % block == 0:
        return x
    return op.Pad(x, op.Concat(ints(0, 0, 0, 0, 0, 0), _missing(x, block), ints(0), axis=0))


def _missing(x: ir.Value, block: int) -> ir.Value:
    """Return what axis 2 lacks to be whole blocks."""
    return op.Mod(op.Neg(_size(x, 2)), ints(block))


def _rows(x: ir.Value, q: ir.Value, *width: int) -> ir.Value:
    """Put blocks side by side again, without what they were filled up with."""
    flat = op.Reshape(x, ints(0, 0, -1, *width))
    return op.Slice(flat, ints(0), _size(q, 2), ints(2))


def _size(x: ir.Value, axis: int) -> ir.Value:
    """Return the size of an axis; folded where it is known."""
    return op.Shape(x, start=axis, end=axis + 1)


TRANSLATIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {_block.OP: block_attention}
