"""Small helpers for writing ONNX: constants, and what is known of values."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
from onnxscript import opset23 as op

FLOAT: Final = ir.DataType.FLOAT


def shape_of(x: ir.Value) -> tuple[Any, ...]:
    """Return a shape: integers, and symbols for dynamic sizes."""
    assert x.shape is not None
    return tuple(x.shape)


def dtype_of(x: ir.Value) -> ir.DataType:
    """Return the type of the elements of a value that is no fresh one."""
    assert x.dtype is not None
    return x.dtype


def as_type(x: ir.Value, dtype: ir.DataType, given: ir.DataType | None = None) -> ir.Value:
    """Cast, unless the value has the type; fresh values do not know theirs, so it is `given`."""
    return x if (given or dtype_of(x)) == dtype else op.Cast(x, to=dtype)


def scalar(value: float, dtype: ir.DataType = FLOAT) -> ir.Value:
    """Return a constant of no dimensions."""
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def ints(*values: int) -> ir.Value:
    """Return a constant of one dimension."""
    return op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))
