"""Give graphs further inputs: kept from call to call, or read from main by blocks.

What is added is gathered first, so each graph is copied once. Blocks of one class that no longer
take the same inputs get classes of their own.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .branches import choices, scope, with_keys
from .errors import OptionError
from .graphs import aten, copy_graph, output_nodes
from .program import MAIN, Instance, Program
from .shapes import describe, fake_mode


class Kind(NamedTuple):
    """Shape and type of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Added(NamedTuple):
    """An input that a block gets.

    Attributes:
        name: Of its placeholder there.
        given: Name of the placeholder of main whose value it is.
        written: Whether the block gives it back.
    """

    name: str
    given: str
    written: bool


@dataclass
class Extension:
    """Inputs to add to the graphs of a program.

    Attributes:
        program: What is added to.
        main: What main gets, by the name of the placeholder.
        blocks: What instances get.
        kept: When finished: of each value that is kept its placeholder in main, and the place of
            its next value among the outputs.
    """

    program: Program
    main: dict[str, Kind] = field(default_factory=dict)
    blocks: dict[str, list[Added]] = field(default_factory=dict)
    kept: list[tuple[str, int]] = field(default_factory=list)

    def keep(self, slot: str, kind: Kind, inside: tuple[str, str] | None) -> None:
        """Add an input of main whose value comes out again.

        Args:
            slot: What its placeholder is called, made a name that one may have.
            kind: Of the value.
            inside: Instance through whose graph it is led, and its name there; None for main.

        Raises:
            OptionError: The instance is called in a branch.
        """
        taken = {node.name for node in self.program.main.nodes} | self.main.keys()
        wanted = _identifier(slot)
        name = next(n for i in count() if (n := f"{wanted}_{i}" if i else wanted) not in taken)
        self.main[name] = kind
        if inside is not None:
            instance, local = inside
            self._at(instance).append(Added(_identifier(local), name, True))

    def read(self, name: str, instance: str) -> None:
        """Let an instance read an input of main.

        Raises:
            OptionError: The instance is called in a branch.
        """
        self._at(instance).append(Added(name, name, False))

    def finish(self) -> Program:
        """Return the program with everything that was added."""
        mapping: dict[fx.Node, fx.Node] = {}
        graph = copy_graph(self.program.main, mapping)
        given = {node.name: node for node in placeholders(graph)}
        for name, kind in self.main.items():
            given[name] = _placeholder(graph, name, kind)
        written = self._extend_calls(graph, mapping, given)
        results = list(output_nodes(graph))
        for name in self.main:
            self.kept.append((name, len(results)))
            results.append(written.get(name) or _copied(graph, given[name]))
        graph.output_node().args = (tuple(results),)
        graphs, instances = self._extend_blocks()
        return self.program.with_(graphs={**graphs, MAIN: graph}, instances=instances)

    def _at(self, instance: str) -> list[Added]:
        if self.program.call(instance).graph is not self.program.main:
            raise OptionError(
                f"{instance} is computed on some calls only, so it cannot keep state.",
                where=instance,
                remedy="run the pass before the one that makes the model choose.",
            )
        return self.blocks.setdefault(instance, [])

    def _extend_calls(
        self, graph: fx.Graph, mapping: Mapping[fx.Node, fx.Node], given: Mapping[str, fx.Node]
    ) -> dict[str, fx.Node]:
        """Give calls what their blocks get; return what they give back, by its name in main."""
        written: dict[str, fx.Node] = {}
        for instance, added in self.blocks.items():
            call = mapping[self.program.call(instance)]
            call.args = (*call.args, *(given[each.given] for each in added))
            for name in [each.given for each in added if each.written]:
                value, index = given[name].meta["val"], len(call.meta["val"])
                call.meta = {**call.meta, "val": (*call.meta["val"], value)}
                with graph.inserting_after(call):
                    written[name] = graph.call_function(operator.getitem, (call, index))
                written[name].meta["val"] = value
        return written

    def _extend_blocks(self) -> tuple[dict[str, fx.Graph], dict[str, Instance]]:
        graphs, instances = dict(self.program.graphs), dict(self.program.instances)
        made: dict[str, dict[object, str]] = {}
        for name, instance in self.program.instances.items():
            added = self.blocks.get(name, [])
            values = [self._value(each.given) for each in added]
            key = tuple(
                (e.name, e.written, describe(v)) for e, v in zip(added, values, strict=True)
            )
            classes = made.setdefault(instance.block, {})
            if key not in classes:
                classes[key] = self._split(instance.block, graphs) if classes else instance.block
                if added:
                    old = self.program.graphs[instance.block]
                    known = graphs[classes[key]] if choices(old) else old
                    graphs[classes[key]] = _extended(known, added, values)
            instances[name] = Instance(classes[key], instance.weights)
        return graphs, instances

    def _value(self, name: str) -> Tensor:
        """Return what describes an input of main."""
        if name in self.main:
            return _fake(self.program.main, self.main[name])
        (place,) = (node for node in placeholders(self.program.main) if node.name == name)
        value: Tensor = place.meta["val"]
        return value

    def _split(self, block: str, graphs: dict[str, fx.Graph]) -> str:
        """Add the graphs of a class as the program has it under another name, and return that."""
        name = next(n for i in count(1) if (n := f"{block}.{i}") not in graphs)
        keys = {key: name + key.removeprefix(block) for key in scope(self.program.graphs, block)}
        for key, new in keys.items():
            graphs[new] = self.program.graphs[key]
            if choices(graphs[new]):
                graphs[new] = copy_graph(graphs[new])
                with_keys(graphs[new], keys.__getitem__)
        return name


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def device_of(graph: fx.Graph) -> torch.device:
    """Return the device of a graph's first tensor."""
    values = (node.meta["val"] for node in placeholders(graph))
    return next(value.device for value in values if isinstance(value, Tensor))


def _extended(graph: fx.Graph, added: Sequence[Added], values: Sequence[Tensor]) -> fx.Graph:
    """Return the graph of a block with more inputs; those that are written come out again."""
    graph = copy_graph(graph)
    results = list(output_nodes(graph))
    for each, value in zip(added, values, strict=True):
        place = _placeholder(graph, each.name, Kind(tuple(value.shape), value.dtype))
        if each.written:
            results.append(_copied(graph, place))
    graph.output_node().args = (tuple(results),)
    return graph


def _placeholder(graph: fx.Graph, name: str, kind: Kind) -> fx.Node:
    """Add an input behind the others."""
    value = _fake(graph, kind)
    with graph.inserting_after(placeholders(graph)[-1]):
        place = graph.placeholder(name)
    place.meta["val"] = value
    return place


def _copied(graph: fx.Graph, place: fx.Node) -> fx.Node:
    """Add a copy of an input at the end."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(aten.clone.default, (place,))
    node.meta["val"] = place.meta["val"]
    return node


def _fake(graph: fx.Graph, kind: Kind) -> Tensor:
    with fake_mode(graph):
        return torch.empty(kind.shape, dtype=kind.dtype, device=device_of(graph))


def _identifier(name: str) -> str:
    """Return a name that a placeholder may have."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)
