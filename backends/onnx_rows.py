"""Rows of stored tensors as weights of their own: experts that lie in one tensor of the program.

    codes [experts, bytes]      Gather(codes, 3)  ->  initializer "codes::3", some of the same bytes

A runtime fuses products with stored codes only, and ONNX cannot cut tensors of four bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir
from onnxscript import opset23 as op
from torch import Tensor

from .onnx_values import scalar

STORED_AS: Final = "stored as"  # key in `Value.meta`: element type and shape behind raw bytes
_ROW: Final = "row"  # key in `Value.meta`: which row a value is
_MARK: Final = "::"


def store_as(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    """Note what the bytes of an initializer are."""
    value.meta[STORED_AS] = (dtype, shape)


def row(tensor: ir.Value, index: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Return one row of an initializer, its bytes taken for elements of another type."""
    found = op.Gather(tensor, scalar(index, ir.DataType.INT64))
    store_as(found, dtype, shape)
    found.meta[_ROW] = index
    return found


def cut_rows(graph: ir.Graph) -> None:
    """Make initializers of the rows that `row` has written down."""
    for node in list(graph):
        result = node.outputs[0]
        if _ROW not in result.meta:
            continue
        source, index = node.inputs[0], result.meta[_ROW]
        assert source is not None
        assert source.const_value is not None
        name = f"{source.name}{_MARK}{index}"
        if name not in graph.initializers:
            data = ir.tensor(source.const_value.numpy()[index])
            value = ir.Value(name=name, const_value=data)
            value.meta[STORED_AS] = result.meta[STORED_AS]
            graph.register_initializer(value)
        result.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)


def find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a tensor of the program, or a row of one; None when there is none of that name."""
    if name in tensors:
        return tensors[name]
    base, index = _parted(name)
    whole = tensors.get(base)
    return None if whole is None or not 0 <= index < len(whole) else whole[index]


def span(spans: Mapping[str, tuple[int, int]], name: str, length: int) -> tuple[int, int]:
    """Return first byte and number of bytes of a tensor in a file, or of a row so long."""
    if name in spans:
        return spans[name]
    base, index = _parted(name)
    return spans[base][0] + index * length, length


def _parted(name: str) -> tuple[str, int]:
    base, _, index = name.rpartition(_MARK)
    return base, int(index) if index.isdecimal() else -1
