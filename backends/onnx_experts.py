"""How feed-forward experts become ONNX: standard ops that any runtime has.

    order     visits (token, choice) sorted by expert              TopK
    rows      x[order // k], cut where the expert changes          Gather, Split
    answers   act(rows @ up.T) @ down.T, expert by expert          Gemm, Gemm
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

from ..ir.ops import moe_ffn as _moe
from ..kernels.activations import QUICK
from .onnx_values import dtype_of, ints, scalar, shape_of

Function = Callable[[ir.Value], ir.Value]
INT64 = ir.DataType.INT64


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
    tensors = (gate, up, up_bias, gate_bias, down, down_bias)
    answers = []
    for expert, part in enumerate(_parts(rows, counts, experts)):
        own: list[Any] = [None if t is None else _own(t, expert) for t in tensors]
        answers.append(_expert(part, *own, act=act))
    place = _argsort(order)  # where the answer to each visit is
    shape = op.Concat(op.Shape(index), ints(dim), axis=0)
    answer = op.Reshape(op.Gather(op.Concat(*answers, axis=0), place), shape)
    return op.Squeeze(op.MatMul(op.Unsqueeze(weight, ints(-2)), answer), ints(-2))


def _expert(
    rows: ir.Value,
    gate: ir.Value | None,
    up: ir.Value,
    up_bias: ir.Value | None,
    gate_bias: ir.Value | None,
    down: ir.Value,
    down_bias: ir.Value | None,
    *,
    act: Function,
) -> ir.Value:
    hidden = op.Gemm(rows, up, up_bias, transB=1)
    if gate is None:
        hidden = act(hidden)
    else:
        hidden = op.Mul(act(op.Gemm(rows, gate, gate_bias, transB=1)), hidden)
    return op.Gemm(hidden, down, down_bias, transB=1)


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


def _own(tensor: ir.Value, expert: int) -> ir.Value:
    return op.Gather(tensor, scalar(expert, INT64))


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


TRANSLATIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {_moe.OP: moe_ffn}
