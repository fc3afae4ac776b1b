"""How single ops become ONNX, where torch's own translation is missing or runs slowly.

    int8_linear        QuantizeLinear -> MatMulIntegerToFloat       u8 x s8, the fast pair
    quantized_linear   DequantizeLinear -> MatMul                   fused to MatMulNBits
    hash_linear        Gather -> MatMul with the scores         rows of all tables at once
    attention          Attention of [batch, seq, heads * head_dim]  no transposed copies

Each function takes the arguments of its op, tensors as ONNX values, and is called while the model
is translated. The names of `com.microsoft` are those of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

from ..ir.ops import hash_linear as _hash
from ..ir.ops import int8_linear as _int8
from ..ir.ops import quantized_embedding as _embedding
from ..ir.ops import quantized_linear as _weight_only
from . import onnx_attention, onnx_blocks, onnx_experts
from .onnx_rows import store_as
from .onnx_values import FLOAT, as_type, dtype_of, ints, scalar, shape_of

_CENTRE = (
    128  # unsigned code of zero; ONNX Runtime multiplies u8 x s8 six times faster than s8 x s8
)
_TINY = 1e-37  # a row of zeros is divided by this instead of zero
_MOST_FEATURES = 2**31 // (255 * _int8.WEIGHT_LIMIT)


def int8_linear(
    x: ir.Value, codes: ir.Value, scale: ir.Value, bias: ir.Value | None = None
) -> ir.Value:
    """Quantize each row of `x`, multiply integers, rescale.

    A row with NaN or infinity gives other garbage than the reference, which makes it all NaN.
    """
    features, _ = shape_of(codes)
    if features > _MOST_FEATURES:
        raise NotImplementedError(f"sums over {features} inputs overflow 32 bits")
    dtype, x = dtype_of(x), as_type(x, FLOAT)
    last = ints(-1)
    peak = op.Max(op.ReduceMax(x, last, keepdims=1), op.Neg(op.ReduceMin(x, last, keepdims=1)))
    step = op.Max(op.Div(peak, scalar(127)), scalar(_TINY))
    rows = op.Reshape(_quantize_rows(x, features, step), op.Shape(x), allowzero=1)
    centre = op.Constant(value=ir.tensor(_CENTRE, dtype=ir.DataType.UINT8))
    product = _matmul_integer_to_float(rows, codes, scalar(1), as_type(scale, FLOAT), centre)
    y = as_type(op.Mul(product, step), dtype, given=FLOAT)
    return y if bias is None else op.Add(y, bias)


def quantized_linear(
    x: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bias: ir.Value | None,
    bits: int,
    group_size: int,
) -> ir.Value:
    """Multiply by the dequantized weight."""
    inputs, (groups, features) = shape_of(x)[-1], shape_of(scale)
    if bits == 4:
        kind = ir.DataType.INT4 if zero_point is None else ir.DataType.UINT4
        store_as(codes, kind, (inputs, features))
        if zero_point is not None:
            store_as(zero_point, kind, (groups, features))
    weight = op.DequantizeLinear(codes, scale, zero_point, axis=0, block_size=group_size)
    y = op.MatMul(x, as_type(weight, dtype_of(x), given=dtype_of(scale)))
    return y if bias is None else op.Add(y, bias)


def quantized_embedding(ids: ir.Value, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Gather rows of codes and their scales."""
    rows = op.Cast(op.Gather(codes, ids), to=dtype_of(scale))
    return op.Mul(rows, op.Gather(scale, ids))


def hash_linear(x: ir.Value, tables: ir.Value, bias: ir.Value | None, score: str) -> ir.Value:
    """Hash in single precision, read one row of each table, and multiply them by their scores."""
    (count, height, features), dtype = shape_of(tables), dtype_of(x)
    bits, last = height.bit_length() - 1, ints(-1)
    shape = op.Concat(op.Shape(x, end=-1), ints(count, bits), axis=0)
    z = op.Reshape(as_type(x, FLOAT), shape)  # [*batch, tables, bits]
    powers = ints(*(2 ** (bits - 1 - bit) for bit in range(bits)))
    signs = op.Cast(op.GreaterOrEqual(z, scalar(0)), to=ir.DataType.INT64)
    code = op.ReduceSum(op.Mul(signs, powers), last, keepdims=0)
    size = op.Abs(z)
    weight = op.ReduceProd(op.Sigmoid(op.Add(size, size)), last, keepdims=0)
    if score == "l1_softmax":
        weight = op.Mul(op.ReduceSum(size, last, keepdims=0), weight)
    table = op.Reshape(tables, ints(-1, features))
    rows = op.Gather(table, op.Add(code, ints(*range(0, count * height, height))))
    rows = as_type(rows, FLOAT, given=dtype_of(tables))
    y = op.Squeeze(op.MatMul(op.Unsqueeze(weight, ints(-2)), rows), ints(-2))
    y = as_type(y, dtype, given=FLOAT)
    return y if bias is None else op.Add(y, bias)


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """Attend; heads stay side by side where they come that way."""
    rank = len(shape_of(query))
    if dropout_p or rank != 4:
        raise NotImplementedError(f"attention of rank {rank} with dropout {dropout_p}")
    options: dict[str, Any] = {"is_causal": int(is_causal)}
    if scale is not None:
        options["scale"] = float(scale)
    mask = _whole_mask(attn_mask, query, key)
    operands = [query, key, value]
    flat = [_heads_side_by_side(operand) for operand in operands]
    if any(operand is None for operand in flat):
        return op.Attention(*operands, mask, **options)[0]
    heads, (_, kv_heads, _, head_dim) = shape_of(query)[1], shape_of(value)
    y = op.Attention(*flat, mask, q_num_heads=heads, kv_num_heads=kv_heads, **options)[0]
    split = op.Reshape(y, ints(0, 0, heads, head_dim))
    return op.Transpose(split, perm=[0, 2, 1, 3])


def split(x: ir.Value, sizes: Sequence[int | ir.Value], dim: int = 0) -> Sequence[ir.Value]:
    """Slice; torch's translation goes through a sequence, which copies every part once more."""
    parts, start = [], ints(0)
    for size in sizes:
        length = ints(size) if isinstance(size, int) else op.Reshape(size, ints(-1))
        end = op.Add(start, length)
        parts.append(op.Slice(x, start, end, ints(dim)))
        start = end
    return parts


def split_every(x: ir.Value, size: int | ir.Value, dim: int = 0) -> Sequence[ir.Value] | ir.Value:
    """Split into parts of one size, the last one shorter; as a sequence when sizes are dynamic."""
    total = shape_of(x)[dim]
    if not isinstance(total, int) or not isinstance(size, int):
        return op.SplitToSequence(x, size, axis=dim)
    return split(x, [min(size, total - start) for start in range(0, max(total, 1), size)], dim)


TRANSLATIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    _hash.OP: hash_linear,
    _int8.OP: int8_linear,
    _weight_only.OP: quantized_linear,
    _embedding.OP: quantized_embedding,
    torch.ops.aten.split_with_sizes.default: split,
    torch.ops.aten.split.Tensor: split_every,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    **onnx_attention.TRANSLATIONS,
    **onnx_blocks.TRANSLATIONS,
    **onnx_experts.TRANSLATIONS,
}


def _microsoft(name: str, inputs: Mapping[str, str], output: str) -> Op:
    """Declare an op of ONNX Runtime: types of its inputs by name, type of its output."""
    parameters = [OpSchema.FormalParameter(key, kind) for key, kind in inputs.items()]
    result = OpSchema.FormalParameter("y", output)
    schema = OpSchema(name, "com.microsoft", 1, inputs=parameters, outputs=[result])
    return Op(Opset("com.microsoft", 1), name, schema)


_matmul_integer_to_float = _microsoft(
    "MatMulIntegerToFloat",
    {
        "a": "tensor(uint8)",
        "b": "tensor(int8)",
        "a_scale": "tensor(float)",
        "b_scale": "tensor(float)",
        "a_zero_point": "tensor(uint8)",
    },
    output="tensor(float)",
)


def _quantize_rows(x: ir.Value, features: int, step: ir.Value) -> ir.Value:
    """Divide the rows of a matrix by their steps and round, in one op instead of two."""
    steps = op.Reshape(step, ints(-1))
    centre = ir.tensor([_CENTRE], dtype=ir.DataType.UINT8)
    centres = op.ConstantOfShape(op.Shape(steps), value=centre)
    return op.QuantizeLinear(op.Reshape(x, ints(-1, features)), steps, centres, axis=0)


def _heads_side_by_side(x: ir.Value) -> ir.Value | None:
    """Return [batch, seq, heads * head_dim] for the [batch, heads, seq, head_dim] of a transpose.

    None when it comes otherwise, or its heads cannot be counted.
    """
    node, (_, heads, _, head_dim) = x.producer(), shape_of(x)
    if node is None or node.op_type != "Transpose":
        return None
    if tuple(node.attributes["perm"].as_ints()) != (0, 2, 1, 3):
        return None
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    return op.Reshape(node.inputs[0], ints(0, 0, heads * head_dim))


def _whole_mask(mask: ir.Value | None, query: ir.Value, key: ir.Value) -> ir.Value | None:
    """Give a mask rank 4 and its full size in the last two dimensions, as ONNX Runtime wants it."""
    if mask is None:
        return None
    sizes = shape_of(mask)
    if len(sizes) < 4:
        mask = op.Unsqueeze(mask, ints(*range(4 - len(sizes))))
    if sizes[-2:] == (shape_of(query)[2], shape_of(key)[2]):
        return mask
    rows, columns = op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3)
    return op.Expand(mask, op.Concat(ints(1, 1), rows, columns, axis=0))
