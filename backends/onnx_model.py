"""Translate a program to an ONNX model whose weights stay where they are.

    program -> torch.export -> torch.onnx.export -> tidy -> refer

The model names the tensors of the program and does not hold them: initializers are references
into a safetensors file, by name, place and length. A session is given the same tensors from memory
instead. Inside are only tiny tensors and constants that the program does not have.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as cleaning
from torch import Tensor, fx

from ..ir.errors import LoweringError
from ..ir.program import Program
from ..ir.shapes import concrete, dims
from .base import WeightsFile
from .onnx_ops import TRANSLATIONS
from .onnx_rows import STORED_AS, cut_rows, find, span

OPSET = 23
_IR_VERSION = 10
_INLINE_BYTES = 1024  # smaller tensors are repeated inside the model
_TARGET = re.compile(
    r"target=torch\.ops\.([\w.]+)|for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>"
)


def to_onnx(program: Program) -> onnx.ModelProto:
    """Translate a program; references to its tensors have no place yet, see `placed`.

    Raises:
        LoweringError: torch cannot export the program, or an op has no translation.
    """
    inputs, module = example_inputs(program), program.module()
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(module, inputs, dynamic_shapes=_axes(program))
            translated = torch.onnx.export(
                exported,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=dict(TRANSLATIONS),
            )
        except Exception as error:  # of a dozen kinds, most of them private
            raise _untranslatable(program, error) from error
    assert translated is not None
    model = translated.model
    if model.opset_imports.get("") != OPSET:
        raise LoweringError(f"torch wrote ONNX opset {model.opset_imports.get('')}, not {OPSET}.")
    model.ir_version = _IR_VERSION
    translated.rename_axes(_axis_names(program, model.graph))
    _tidy(model)
    _name_inputs(model.graph, [node.name for node in _placeholders(program)])
    _refer(model, program.tensors)
    return ir.to_proto(model)


def placed(model: onnx.ModelProto, weights: WeightsFile, notes: Mapping[str, str]) -> bytes:
    """Return the model with references into a file, and notes among its metadata."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for initializer in references(copy):
        held = {entry.key: entry.value for entry in initializer.external_data}
        offset, length = span(weights.spans, initializer.name, int(held["length"]))
        del initializer.external_data[:]
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            initializer.external_data.add(key=key, value=str(value))
    del copy.metadata_props[:]
    for key, value in notes.items():
        copy.metadata_props.add(key=key, value=value)
    return copy.SerializeToString()


def references(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return the initializers that refer to tensors of the program, by their names."""
    external = onnx.TensorProto.EXTERNAL
    return [tensor for tensor in model.graph.initializer if tensor.data_location == external]


def example_inputs(program: Program) -> tuple[Tensor, ...]:
    """Make inputs of the captured sizes: zeros, which are valid indices everywhere.

    A dynamic size of 1 is made 2 where the range allows, or export would take it for a constant.
    """
    ranges = program.signature.ranges
    sizes = {
        name: 2 if size == 1 and (ranges.get(name, (0, None))[1] or 2) >= 2 else size
        for name, size in program.sizes().items()
    }
    size_of = concrete(program, sizes)
    return tuple(
        torch.zeros([size_of(size) for size in value.shape], dtype=value.dtype)
        for value in (node.meta["val"] for node in _placeholders(program))
    )


def _placeholders(program: Program) -> list[fx.Node]:
    return [node for node in program.main.nodes if node.op == "placeholder"]


def _axes(program: Program) -> tuple[dict[int, Any], ...]:
    """Return dynamic dimensions for `torch.export`, by name where they have one."""
    ranges, made = program.signature.ranges, dict[str, Any]()

    def axis(size: str) -> Any:
        if not size.isidentifier():
            return torch.export.Dim.AUTO
        if size not in made:
            low, high = ranges.get(size, (0, None))
            made[size] = torch.export.Dim(size, min=low, max=high)
        return made[size]

    return tuple(
        {index: axis(size) for index, size in enumerate(shape) if isinstance(size, str)}
        for shape in _shapes(program)
    )


def _shapes(program: Program) -> list[tuple[int | str, ...]]:
    """Return the shape of every input, dynamic sizes by name."""
    symbols = program.signature.symbols
    return [dims(node.meta["val"], symbols) for node in _placeholders(program)]


def _axis_names(program: Program, graph: ir.Graph) -> dict[str | ir.SymbolicDim, str]:
    """Map the symbols that export made up to the names of the program."""
    names: dict[str | ir.SymbolicDim, str] = {}
    for value, shape in zip(graph.inputs, _shapes(program), strict=True):
        for symbol, size in zip(value.shape or (), shape, strict=True):
            if isinstance(symbol, ir.SymbolicDim) and isinstance(size, str) and size.isidentifier():
                names[str(symbol.value)] = size
    return names


def _tidy(model: ir.Model) -> None:
    """Remove what a reader does not need, first of all paths of source files. Linear in nodes."""
    graph = model.graph
    outputs = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()
    for item in (model, graph):
        item.metadata_props.clear()
    _drop_empty_reshapes(graph)
    cut_rows(graph)
    Sequential(
        cleaning.ClearMetadataAndDocStringPass(),
        cleaning.CommonSubexpressionEliminationPass(),
    )(model)
    _drop_identities(graph)
    for function in model.functions.values():
        _drop_identities(function)
    Sequential(
        cleaning.OutputFixPass(),
        cleaning.RemoveUnusedNodesPass(),
        cleaning.RemoveUnusedFunctionsPass(),
        cleaning.RemoveUnusedOpsetsPass(),
    )(model)


def _drop_identities(scope: ir.Graph | ir.Function) -> None:
    """Drop copies, but for what graphs return: a branch must return a value of its own."""
    for node in list(ir.traversal.RecursiveGraphIterator(scope)):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type == "Identity" and source is not None and not result.is_graph_output():
            source.shape, source.type = source.shape or result.shape, source.type or result.type
            result.replace_all_uses_with(source)
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _name_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Call inputs as the program does; an output that passes one on takes another name."""
    for output in graph.outputs:
        if output.name in names:
            output.name = f"{output.name}_out"
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name


def _drop_empty_reshapes(graph: ir.Graph) -> None:
    """Drop reshapes to the shape a value has; they keep ONNX Runtime from joining transposes."""
    for node in list(graph):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or source is None or result.is_graph_output():
            continue
        if source.shape is not None and source.shape == result.shape and _is_known(source.shape):
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _is_known(shape: ir.Shape) -> bool:
    return all(isinstance(size, int) or size.value is not None for size in shape)


def _refer(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Replace the data of initializers that are tensors of the program by references."""
    for name, value in model.graph.initializers.items():
        stored, tensor = value.meta.get(STORED_AS), find(tensors, name)
        if tensor is None or (stored is None and tensor.nbytes < _INLINE_BYTES):
            continue
        assert value.const_value is not None
        dtype, shape = stored or (value.const_value.dtype, tuple(tensor.shape))
        value.dtype, value.shape = dtype, ir.Shape(shape)
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, dtype, shape=value.shape, name=name
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch says about optional packages and its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _untranslatable(program: Program, error: BaseException) -> LoweringError:
    """Name the op that torch stumbled over, its place, and the pass that made it."""
    cause: BaseException | None = error
    texts = []
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    match = next(filter(None, map(_TARGET.search, texts)), None)
    if match is None:
        reason = " ".join(texts[-1].split())[:300]
        return LoweringError(f"the program does not export to ONNX: {reason}.", remedy=_REMEDY)
    target = match[1] or f"{match[2].replace('::', '.')}.{match[3]}"
    places = [n for g in program.graphs.values() for n in g.nodes if str(n.target) == target]
    maker, where = "", None
    if places:
        sources = places[0].meta.get("from_node") or []
        maker = f", made by {sources[-1].pass_name}" if sources else ""
        where = str(places[0].meta.get("local_path", places[0].name))
    reason = " ".join(texts[-1].split())[:200]
    return LoweringError(
        f"onnxruntime cannot lower {target}{maker}: {reason}.", where=where, remedy=_REMEDY
    )


_REMEDY = "use the backend eager."
