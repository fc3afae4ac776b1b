"""Graphs made by others, and what is recorded of a run of one.

A graph of any origin is a list of steps that read and write named values. That is all that is
needed to find where it departs from a model; see `locate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..backends.artefact import load
from ..backends.base import Lowered
from ..backends.engine import Engine
from ..ir.capture import capture
from ..ir.errors import LoweringError, OptionError
from ..ir.flatten import flatten
from ..ir.graphs import module_path, output_nodes
from ..ir.program import Program
from ..ir.run import run
from ..ir.signature import Signature, TensorSpec


@dataclass(frozen=True)
class Port:
    """An input.

    Attributes:
        name: As the graph calls it.
        dtype: Element type.
        shape: A size per dimension, or for a dynamic one its name or an expression over names.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """A node that ran.

    Attributes:
        name: Of the node.
        op: Of the operator.
        domain: Of the operator; empty for the standard one.
        attributes: Literals it was given.
        reads: Names of values.
        writes: Names of values.
    """

    name: str
    op: str
    domain: str
    attributes: Mapping[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """What a run computed.

    Attributes:
        steps: In the order they ran.
        values: By name; inputs among them.
        outputs: Names of the results.
        constants: Weights and literals by name.
    """

    steps: Sequence[Step]
    values: Mapping[str, Tensor]
    outputs: Sequence[str]
    constants: Mapping[str, Tensor] = field(default_factory=dict)


class Foreign(Protocol):
    """A graph, or anything that is called, to be compared with a model."""

    @property
    def label(self) -> str:
        """What it is, for messages."""

    @property
    def inputs(self) -> tuple[Port, ...] | None:
        """What it takes; None for the inputs of the model."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on flat inputs.

        Raises:
            LoweringError: It does not run; `where` names the node if that is known.
        """

    def trace(self, inputs: Sequence[Tensor]) -> Trace | None:
        """Run and keep every value; None when nothing inside can be seen."""


@dataclass(frozen=True)
class ForeignCallable:
    """Something that is called like the model.

    Attributes:
        call: The callable.
        signature: How the model is called.
        label: What it is.
    """

    call: Callable[..., Any]
    signature: Signature
    label: str = "the callable"
    inputs: None = None

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call it and flatten what it returns."""
        args, kwargs = call_arguments(self.signature, inputs)
        try:
            with torch.no_grad():
                result = self.call(*args, **kwargs)
        except Exception as error:  # whatever a stranger's code raises
            raise LoweringError(f"{type(error).__name__}: {error}") from error
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def trace(self, inputs: Sequence[Tensor]) -> None:
        """Nothing inside can be seen."""
        return


@dataclass(frozen=True)
class ForeignProgram:
    """An exported program, or a captured one that may have been lowered.

    Attributes:
        program: As captured.
        label: What it is.
        lowered: What runs in its place.
    """

    program: Program
    label: str = "the exported program"
    lowered: Lowered | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs of its signature."""
        return tuple(Port(s.name, s.dtype, s.shape) for s in self.program.signature.inputs)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run what was lowered, or else node by node."""
        flat = self.program.arranged(inputs)
        try:
            return self.lowered.run(flat) if self.lowered else run(self.program, flat)
        except Exception as error:  # torch and runtimes raise a dozen classes
            raise LoweringError(f"{type(error).__name__}: {error}") from error

    def trace(self, inputs: Sequence[Tensor]) -> Trace:
        """Run node by node and keep what every node returned."""
        steps: list[Step] = []
        values: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}

        def saw(_: str | None, node: fx.Node, value: Any) -> None:
            if isinstance(value, Tensor):
                (constants if node.op == "get_attr" else values)[node.name] = value
            if node.op == "call_function":
                steps.append(_step(node))

        flat = flatten(self.program)
        run(flat, self.program.arranged(inputs), on_node=saw)
        return Trace(steps, values, [node.name for node in output_nodes(flat.main)], constants)


def foreign_of(other: Any, model: Program, *, trust: bool = False) -> Foreign:
    """Return something foreign in the one form it is checked in.

    Args:
        other: Path of an ONNX file, a `.pt2` file or a saved engine; an `onnx.ModelProto`, an
            `ExportedProgram`, a program, an engine, or a callable that is called like the model.
        model: Says how a callable is called.
        trust: Whether a `.pt2` file may be read, which can run code of whoever made it.

    Raises:
        OptionError: It is none of these.
    """
    if isinstance(other, str | Path):
        return _from_path(Path(other), trust)
    if isinstance(other, ExportedProgram):
        return ForeignProgram(capture(other, fold=False))
    if isinstance(other, Program):
        return ForeignProgram(other, "the program")
    if isinstance(other, Engine):
        return ForeignProgram(other.program, "the engine", other.lowered)
    if type(other).__name__ == "ModelProto":
        from .foreign_onnx import ForeignOnnx

        return ForeignOnnx.of(other)
    if callable(other):
        return ForeignCallable(other, model.signature)
    raise OptionError(
        f"cannot verify a {type(other).__name__}.",
        remedy="give the path of an ONNX file, an ExportedProgram, an engine or a callable.",
    )


def _from_path(path: Path, trust: bool) -> Foreign:
    if not path.exists():
        raise OptionError(f"there is no file {path}.")
    if path.suffix == ".onnx":
        from .foreign_onnx import ForeignOnnx

        return ForeignOnnx.open(path)
    if path.suffix == ".pt2":
        if not trust:
            raise OptionError(
                f"{path} can run code of whoever made it when it is read.",
                remedy="give trust=True (--trust) if you know where it comes from.",
            )
        return ForeignProgram(capture(torch.export.load(path), fold=False), str(path))
    engine = load(path)
    return ForeignProgram(engine.program, str(path), engine.lowered)


def call_arguments(
    signature: Signature, inputs: Sequence[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call, as the example gave them, from flat tensors."""
    tensors = iter(inputs)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in signature.arguments:
        leaves = [next(tensors) if isinstance(leaf, TensorSpec) else leaf
                  for leaf in argument.leaves]  # fmt: skip
        value = argument.structure.build(leaves)
        if argument.positional:
            args.append(value)
        else:
            kwargs[argument.name] = value
    return args, kwargs


def _step(node: fx.Node) -> Step:
    literals = {f"args.{index}": arg for index, arg in enumerate(node.args) if _is_literal(arg)}
    literals |= {name: arg for name, arg in node.kwargs.items() if _is_literal(arg)}
    reads = tuple(source.name for source in node.all_input_nodes)
    path = module_path(node)
    name = f"{path} ({node.name})" if path else node.name
    return Step(name, str(node.target), "", literals, reads, (node.name,))


def _is_literal(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
