"""Count what a program costs twice: from its graph or the plan, and from the tensors of a run.

The prediction reads shapes; the measurement adds up tensors that exist, and the operations that
ran on them. They must agree: a size that is only believed is no certificate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..ir.cost import coded_weights, is_view, node_flops, results, weights_read
from ..ir.errors import VerifyError
from ..ir.graphs import place_of
from ..ir.ops import OPS
from ..ir.program import Program
from ..ir.regions import Region
from ..passes.base import Pass
from .numerics import Inputs

BINDING = ("parameters", "weight_bytes")  # counts whose prediction must be met
COUNTED = ("parameters", "activated_parameters", "weight_bytes", "flops", "bytes_moved")


@dataclass(frozen=True)
class Count:
    """One count.

    Attributes:
        predicted: By the plan or by the graph's formulas.
        measured: On tensors, in a run.
    """

    predicted: int
    measured: int


class Meter:
    """Counts what a run of a program does; its `saw` is an observer of nodes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flops: Counter[str] = Counter()
        self.bytes_moved = 0
        self.coded: dict[str, int] = {}
        self._ran: set[tuple[str | None, fx.Graph]] = set()
        self._read: dict[object, int] = {}
        self._idle: dict[object, int] = {}
        self._shapes: dict[tuple[str | None, fx.Node], tuple[tuple[int, ...], int]] = {}

    def saw(self, instance: str | None, node: fx.Node, value: Any) -> None:
        """Take the value of a node."""
        self._ran.add((instance, node.graph))
        if not isinstance(value, Tensor) and str(node.target) not in OPS:
            return
        first, *others = results(value)
        size = sum(t.numel() * t.element_size() for t in (first, *others))
        output = self._shapes[instance, node] = tuple(first.shape), size
        if node.op == "get_attr":
            self._saw_weight(instance, node, first)
        if node.op != "call_function" or is_view(node):
            return
        sources = [
            self._shapes[instance, n] for n in _sources(node) if (instance, n) in self._shapes
        ]
        shapes = [shape for shape, _ in sources]
        self.flops.update(node_flops(node, shapes, output[0]))
        self.bytes_moved += output[1] + sum(size for _, size in sources)
        structural = OPS.get(str(node.target))
        names = [self._name(instance, str(slot.target)) for slot in weights_read(node)[:1]]
        if structural is not None and (count := structural.weights(shapes, output[0])):
            self.coded |= dict.fromkeys(names, count)
        if structural is not None and structural.idle is not None:
            (name,) = names
            self._idle[place_of(self.program.tensors[name])] = structural.idle(shapes)

    def _saw_weight(self, instance: str | None, node: fx.Node, value: Tensor) -> None:
        name = self._name(instance, str(node.target))
        if name in self.program.parameters:
            self._read[place_of(value)] = value.numel()

    def _not_run(self) -> dict[str, int]:
        """Count the weights in codes of branches that were not computed, by the codes' name."""
        program, found = self.program, dict[str, int]()
        for instance in (None, *program.instances):
            for graph in map(program.graphs.__getitem__, program.scope(instance)):
                if (instance, graph) not in self._ran:
                    found |= coded_weights(program, graph, instance)
        return found

    def _name(self, instance: str | None, slot: str) -> str:
        return self.program.instances[instance].weights[slot] if instance else slot

    def counts(self) -> dict[str, int]:
        """Return the counts of all runs so far; sizes are those of the tensors there are."""
        tensors = self.program.tensors
        stored = {place_of(t): t.numel() * t.element_size() for t in tensors.values()}
        owned = {place_of(tensors[n]): tensors[n].numel() for n in self.program.parameters}
        return {
            "parameters": sum(owned.values()) + sum((self._not_run() | self.coded).values()),
            "activated_parameters": sum(self._read.values())
            + sum(self.coded.values())
            - sum(self._idle.values()),
            "weight_bytes": sum(stored.values()),
            "flops": self.flops.total(),
            "bytes_moved": self.bytes_moved,
        }


def predict(
    pass_: Pass[Any, Any],
    old: Program,
    new: Program,
    decided: Sequence[tuple[Region, Any]],
    inputs: Inputs,
) -> dict[str, int]:
    """Return what the new program should cost on inputs of these sizes.

    What the pass predicts of its decisions is added to the cost of the old program; what it says
    nothing about comes from the shapes in the new graph.
    """
    changes: Counter[str] = Counter()
    for region, decision in decided:
        changes.update(pass_.predict(region, decision))
    sizes = sizes_of(old, inputs)
    before, after = old.cost(sizes), new.cost(sizes)
    return {
        name: getattr(before, name) + changes[name] if name in changes else getattr(after, name)
        for name in COUNTED
    }


def settle(by: str, predicted: Mapping[str, int], measured: Mapping[str, int]) -> dict[str, Count]:
    """Put prediction and measurement side by side.

    Raises:
        VerifyError: Parameters or bytes are not as predicted.
    """
    counts = {name: Count(predicted[name], measured[name]) for name in COUNTED}
    for name in BINDING:
        if counts[name].predicted != counts[name].measured:
            raise VerifyError(
                f"{by} predicted {counts[name].predicted:,} {name.replace('_', ' ')} and the new"
                f" program has {counts[name].measured:,}.",
                remedy="report it: the pass, or the cost formula of an op it uses, counts wrongly.",
            )
    return counts


def sizes_of(program: Program, inputs: Inputs) -> dict[str, int]:
    """Return the size each dynamic dimension has in flat inputs of `main`."""
    known = program.sizes()
    places = [node.name for node in program.main.nodes if node.op == "placeholder"]
    specs = {spec.name: spec for spec in program.signature.inputs}
    return {
        axis: int(size)
        for name, value in zip(places, program.completed(inputs), strict=True)
        if name in specs
        for axis, size in zip(specs[name].shape, value.shape, strict=True)
        if isinstance(axis, str) and axis in known
    }


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return arguments in order; one that is given twice stands twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found
