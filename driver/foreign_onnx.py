"""ONNX files of any origin, run in ONNX Runtime with all their values in sight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from ..backends.onnx_guard import load_onnx
from ..ir.errors import LoweringError, OptionError
from .foreign import Port, Step, Trace

_NODE = re.compile(r"Node \(([^)]+)\) Op|Name: ?'([^']+)'")
_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |\S*/onnxruntime/\S+ ?|\s+")


@dataclass(frozen=True)
class ForeignOnnx:
    """An ONNX model.

    Attributes:
        model: With its weights.
        label: Where it comes from.
        path: The file, which external weights lie beside; None for a model in memory.
    """

    model: onnx.ModelProto
    label: str
    path: Path | None = None
    _sessions: dict[str, ort.InferenceSession] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> ForeignOnnx:
        """Read a file.

        Raises:
            ArtefactError: It is no ONNX model, or names files it may not name. Whether its graph
                is sound, the runtime says.
        """
        return cls(load_onnx(path, graph=False), str(path), path)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> ForeignOnnx:
        """Take a model from memory."""
        return cls(model, "the ONNX model")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs that are no weights."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(_port(v) for v in self.model.graph.input if v.name not in weights)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(value.name for value in self.model.graph.output)

    @property
    def operators(self) -> dict[str, str]:
        """Operator of every node, by name."""
        return {node.name: node.op_type for node in self.model.graph.node}

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run in ONNX Runtime on the CPU, optimised as users run it."""
        return self._run("as users run it", self._load, inputs)

    def trace(self, inputs: Sequence[Tensor]) -> Trace:
        """Run the graph as it is written and keep the value of every node."""
        names = [*self.outputs, *_inner(self._flat)]
        values = dict(zip(names, self._run("exposed", self._expose, inputs), strict=True))
        values |= {p.name: t for p, t in zip(self.inputs, inputs, strict=True)}
        graph = self._flat.graph
        steps = [_step(node) for node in graph.node if node.op_type != "Constant"]
        return Trace(steps, values, self.outputs, dict(_constants(graph)))

    @cached_property
    def _flat(self) -> onnx.ModelProto:
        """The model without functions, so that no node hides others."""
        return onnx.inliner.inline_local_functions(self.model)

    def _run(self, kind: str, load: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {p.name: t.detach().contiguous().numpy() for p, t in
                zip(self.inputs, inputs, strict=True)}  # fmt: skip
        try:
            if kind not in self._sessions:
                self._sessions[kind] = load()
            return [torch.from_numpy(np.asarray(v)) for v in self._sessions[kind].run(None, feed)]
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
            found = _NODE.search(str(error))
            node = next(filter(None, found.groups()), None) if found else None
            raise LoweringError(_NOISE.sub(" ", str(error)).strip(), where=node) from error

    def _load(self) -> ort.InferenceSession:
        source = str(self.path) if self.path else self.model.SerializeToString()
        return ort.InferenceSession(source, _options(), providers=["CPUExecutionProvider"])

    def _expose(self) -> ort.InferenceSession:
        model = onnx.ModelProto()
        model.CopyFrom(self._flat)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in _inner(model))
        options = _options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is reported by us
    options.inter_op_num_threads = 1
    return options


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    sizes = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}.{axis}"
        for axis, d in enumerate(tensor.shape.dim)
    )
    return Port(value.name, _torch_type(tensor.elem_type), sizes)


def _torch_type(code: int) -> torch.dtype:
    name = onnx.TensorProto.DataType.Name(code).lower()
    found = getattr(torch, {"float": "float32", "double": "float64"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"inputs of type {name} cannot be made.")
    return found


def _step(node: onnx.NodeProto) -> Step:
    literals = {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute}
    reads = [*node.input, *(name for a in node.attribute for name in _outer(a))]
    return Step(
        name=node.name or node.output[0],
        op=node.op_type,
        domain=node.domain,
        attributes={name: value for name, value in literals.items() if value is not None},
        reads=tuple(filter(None, reads)),
        writes=tuple(filter(None, node.output)),
    )


def _outer(attribute: onnx.AttributeProto) -> Iterator[str]:
    """Yield what the bodies of branches and loops read, names of their own among it."""
    for graph in [attribute.g, *attribute.graphs]:
        for node in graph.node:
            yield from node.input
            for inner in node.attribute:
                yield from _outer(inner)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, bool | int | float | str | list) else None


def _inner(model: onnx.ModelProto) -> list[str]:
    """Name the values that are no outputs yet."""
    shown = {value.name for value in model.graph.output}
    return [
        name
        for node in model.graph.node
        if node.op_type != "Constant"
        for name in node.output
        if name and name not in shown
    ]


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor]]:
    for tensor in graph.initializer:
        yield tensor.name, _tensor(tensor)
    for node in graph.node:
        if node.op_type == "Constant":
            literal: Mapping[str, Any] = {
                a.name: helper.get_attribute_value(a) for a in node.attribute
            }
            (value,) = literal.values()
            tensor = isinstance(value, onnx.TensorProto)
            yield node.output[0], _tensor(value) if tensor else torch.as_tensor(value)


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
