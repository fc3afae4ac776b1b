"""How feed-forward experts become ONNX: standard ops that any runtime has.

    order     visits (token, choice) sorted by expert              TopK
    rows      x[order // k], cut where the expert changes          Gather, Split
    answers   act(rows @ up.T) @ down.T, expert by expert          Gemm, Gemm
              or of codes                                          DequantizeLinear, MatMul
    y         weight @ answers, token by token                     Gather, MatMul

An expert nobody visits multiplies no rows. What one expert owns is cut out of the stored tensors
while a runtime loads the model; a `Loop` over experts would copy it in every call. ONNX Runtime has
an op `MoE`, which chooses experts itself, knows few activations, and is slower for more than one
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
from onnxscript import opset23 as op

from ..ir.ops import dequantize as _dequantize
from ..ir.ops import moe_ffn as _moe
from ..kernels.activations import QUICK
from .onnx_rows import row
from .onnx_values import dtype_of, ints, scalar, shape_of

Function = Callable[[ir.Value], ir.Value]
INT64 = ir.DataType.INT64
_KINDS: Final = {4: (ir.DataType.INT4, ir.DataType.UINT4), 8: (ir.DataType.INT8, ir.DataType.UINT8)}
_PARTS: Final = "parts"  # key in `Value.meta`: what a weight of experts is for each of them, .T


def moe_ffn(
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    gate: ir.Value | None,
    up: ir.Value,
    up_bias: ir.Value | None,
    gate_bias: ir.Value | None,
    down: ir.Value,
    down_bias: ir.Value | None,
    activation: str,
) -> ir.Value:
    """Sort visits by expert; every expert takes its part of them."""
    experts, dim = shape_of(up)[0], shape_of(x)[-1]
    act = _activation(activation, dtype_of(x))
    order, counts = _sorted_visits(index, experts)
    rows = op.Gather(op.Reshape(x, ints(-1, dim)), op.Div(order, op.Shape(index, start=-1)))
    layers = [(gate, gate_bias), (up, up_bias), (down, down_bias)]
    answers = []
    for expert, part in enumerate(_parts(rows, counts, experts)):
        own = [None if w is None else _layer(w, b, expert) for w, b in layers]
        answers.append(_expert(part, *own, act=act))
    place = _argsort(order)  # where the answer to each visit is
    shape = op.Concat(op.Shape(index), ints(dim), axis=0)
    answer = op.Reshape(op.Gather(op.Concat(*answers, axis=0), place), shape)
    return op.Squeeze(op.MatMul(op.Unsqueeze(weight, ints(-2)), answer), ints(-2))


def dequantize(
    codes: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> ir.Value:
    """Dequantize expert by expert; who multiplies by one of them reads that one alone."""
    experts, groups, outputs = shape_of(scale)
    signed, unsigned = _KINDS[bits]
    kind = signed if zero_point is None else unsigned
    parts = []
    for expert in range(experts):
        own = row(codes, expert, kind, (in_features, outputs))
        zero = None if zero_point is None else row(zero_point, expert, kind, (groups, outputs))
        scales = op.Gather(scale, scalar(expert, INT64))
        parts.append(op.DequantizeLinear(own, scales, zero, axis=0, block_size=group_size))
    whole = op.Concat(*(op.Unsqueeze(part, ints(0)) for part in parts), axis=0)
    result = op.Transpose(whole, perm=[0, 2, 1])
    result.meta[_PARTS] = parts
    return result


def _expert(
    rows: ir.Value,
    gate: Function | None,
    up: Function | None,
    down: Function | None,
    *,
    act: Function,
) -> ir.Value:
    assert up is not None
    assert down is not None
    hidden = act(up(rows)) if gate is None else op.Mul(act(gate(rows)), up(rows))
    return down(hidden)


def _layer(weight: ir.Value, bias: ir.Value | None, expert: int) -> Function:
    """Return what multiplies by the weight of one expert."""
    own = None if bias is None else op.Gather(bias, scalar(expert, INT64))
    if _PARTS not in weight.meta:
        rows = op.Gather(weight, scalar(expert, INT64))
        return lambda x: op.Gemm(x, rows, own, transB=1)
    columns = weight.meta[_PARTS][expert]  # a product with codes is fused, `Gemm` is not

    def layer(x: ir.Value) -> ir.Value:
        y = op.MatMul(x, columns)
        return y if own is None else op.Add(y, own)

    return layer


def _sorted_visits(index: ir.Value, experts: int) -> tuple[ir.Value, ir.Value]:
    """Return the visits in the order of their experts, and how many each expert has."""
    expert = op.Reshape(index, ints(-1))
    mine = op.Equal(op.Unsqueeze(expert, ints(1)), ints(*range(experts)))
    return _argsort(expert), op.ReduceSum(op.Cast(mine, to=INT64), ints(0), keepdims=0)


def _argsort(x: ir.Value) -> ir.Value:
    _, order = op.TopK(x, op.Shape(x), largest=0)
    return order


def _parts(rows: ir.Value, counts: ir.Value, experts: int) -> Sequence[ir.Value]:
    """Cut rows into one part per expert."""
    if experts == 1:
        return [rows]
    parts = op.Split(rows, counts, num_outputs=experts)
    parts[0].producer().attributes.pop("num_outputs")  # must not stand beside sizes
    return parts


def _activation(name: str, dtype: ir.DataType) -> Function:
    """Return what writes an activation down."""
    functions: Mapping[str, Function] = {
        "gelu": op.Gelu,
        "gelu_tanh": lambda x: op.Gelu(x, approximate="tanh"),
        "none": lambda x: x,
        "quick_gelu": lambda x: op.Mul(x, op.Sigmoid(op.Mul(x, scalar(QUICK, dtype)))),
        "relu": op.Relu,
        "relu2": lambda x: op.Pow(op.Relu(x), scalar(2, dtype)),
        "sigmoid": op.Sigmoid,
        "silu": lambda x: op.Mul(x, op.Sigmoid(x)),
        "tanh": op.Tanh,
    }
    return functions[name]


TRANSLATIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    _dequantize.OP: dequantize,
    _moe.OP: moe_ffn,
}
