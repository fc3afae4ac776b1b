"""Splice modules into a graph and its branches, in the place of regions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from .branches import (
    begin,
    branches_of,
    choices,
    choose,
    free_keys,
    is_cond,
    operands_of,
    scope,
    with_keys,
    without_unread,
)  # fmt: skip
from .errors import VerifyError
from .graphs import copy_graph, output_nodes, positions, remove_dead
from .program import Program
from .regions import Region
from .replacement import Replacement
from .shapes import describe, fake_mode
from .trace import Traced, trace


@dataclass
class Slot:
    """A new weight: the `get_attr` nodes that read it, several where branches do."""

    nodes: list[fx.Node]

    @property
    def name(self) -> str:
        """What the nodes name."""
        return str(self.nodes[0].target)

    def rename(self, name: str) -> None:
        """Let the nodes name something else."""
        for node in self.nodes:
            node.target = name


@dataclass
class Spliced:
    """What becomes of a graph.

    Attributes:
        graphs: The graph and its branches by their new keys.
        slots: One for each weight of each replacement, in order; one nothing reads has no nodes.
    """

    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)

    @property
    def fresh(self) -> set[fx.Node]:
        """The nodes of new weights."""
        return {node for slot in self.slots for node in slot.nodes}

    @property
    def kept(self) -> set[str]:
        """The slots the graphs had before and still have."""
        fresh = self.fresh
        nodes = (node for graph in self.graphs.values() for node in graph.nodes)
        return {str(n.target) for n in nodes if n.op == "get_attr" and n not in fresh}


class Splicer:
    """Splices replacements into graphs of a program; modules that are built alike trace once.

    Args:
        program: Where the regions are.
        by: Name of the pass, kept in the provenance of new nodes.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program, self.by = program, by
        self.traces: dict[Any, Traced] = {}

    def splice(self, root: str, target: str, replacements: Sequence[Replacement]) -> Spliced:
        """Copy a graph and its branches with regions replaced; what stays as it is is shared.

        Args:
            root: Key of the graph.
            target: Key of the copy, with which those of its branches begin.
            replacements: What is replaced in the graph and in its branches.
        """
        old, done = self.program.graphs, Spliced()
        keys = {key: target + key.removeprefix(root) for key in scope(old, root)}
        touched = {replacement.region.graph for replacement in replacements}
        mapping: dict[fx.Node, fx.Node] = {}
        for key, new in keys.items():
            done.graphs[new] = old[key]
            if key in touched or (key != new and choices(old[key])):
                done.graphs[new] = copy_graph(old[key], mapping)
                with_keys(done.graphs[new], keys.__getitem__)
        for replacement in replacements:
            self._put(done, keys[replacement.region.graph], replacement, mapping)
        for key in touched:
            remove_dead(done.graphs[keys[key]])
        for slot in done.slots:
            slot.nodes = [node for node in slot.nodes if not node._erased]
        _name_slots(done)
        return done

    def _put(
        self, done: Spliced, key: str, replacement: Replacement, mapping: dict[fx.Node, fx.Node]
    ) -> None:
        """Compute a region's outputs another way, and let their readers read that."""
        region, graph = replacement.region, done.graphs[key]
        order = positions(self.program.graphs[region.graph])
        latest = max((order[node] for node in region.inputs), default=-1)
        anchor = next(node for node in region.nodes if order[node] > latest)
        inputs = [mapping[node] for node in region.inputs]
        with graph.inserting_before(mapping[anchor]):
            insertion = _Insertion(self, done, replacement)
            results = insertion.results(graph, key, inputs)
        _check_outputs(region, results, self.by)
        for node, result in zip(region.outputs, results, strict=True):
            mapping[node].replace_all_uses_with(result)
            mapping[node] = result

    def trace(self, replacement: Replacement, part: int, values: Sequence[Any]) -> Traced:
        """Trace a part of a replacement, or return the trace of one that is built alike."""
        key = (replacement.key, part, tuple(map(describe, values)))
        if key not in self.traces:
            mode = fake_mode(self.program.graphs[replacement.region.graph])
            self.traces[key] = trace(replacement.parts[part], values, mode)
        return self.traces[key]


class _Insertion:
    """One replacement on its way into a graph."""

    def __init__(self, splicer: Splicer, done: Spliced, replacement: Replacement) -> None:
        self.splicer, self.done, self.replacement = splicer, done, replacement
        source = replacement.region.outputs[0]
        self.meta = {
            "nn_module_stack": source.meta.get("nn_module_stack", {}),
            "stack_trace": source.meta.get("stack_trace"),
            "local_path": replacement.region.path,
            "from_node": [NodeSource(source, splicer.by, NodeSourceAction.REPLACE)],
        }

    def results(self, graph: fx.Graph, key: str, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Insert the parts at the insertion point of a graph; return the region's outputs."""
        if len(self.replacement.parts) == 1:
            return self._part(0, graph, key, inputs)
        predicate, *values = self._part(0, graph, key, inputs)
        keys = free_keys(key, self.done.graphs)
        region = self.replacement.region
        for branch in keys:
            self.done.graphs[branch] = fx.Graph()
        kept, other = (self.done.graphs[branch] for branch in keys)
        places, given = (*region.inputs, *values), (*inputs, *values)
        env, operands = begin(kept, places, given)
        moved = [env[node] for node in places] + _moved(kept, region, env)
        afterwards = self.replacement.parts[2:]
        results = self._part(2, kept, keys[0], moved) if afterwards else moved[len(places) :]
        self._end(kept, results)
        env, _ = begin(other, places, given)
        self._end(other, self._part(1, other, keys[1], [env[node] for node in places]))
        operands = without_unread((kept, other), operands)
        recorded = [node.meta["val"] for node in region.outputs]
        choice = choose(graph, predicate, keys, operands, recorded)
        choice.meta |= self.meta
        return [self._pick(graph, choice, index) for index in range(len(recorded))]

    def _end(self, branch: fx.Graph, results: Sequence[fx.Node]) -> None:
        """Let a branch return what its region gave."""
        _check_outputs(self.replacement.region, results, self.splicer.by)
        branch.output(tuple(results))
        remove_dead(branch)

    def _part(
        self, part: int, graph: fx.Graph, key: str, inputs: Sequence[fx.Node]
    ) -> list[fx.Node]:
        """Copy what a part computes; return its results."""
        traced = self.splicer.trace(self.replacement, part, [n.meta["val"] for n in inputs])
        places = [node for node in traced.graph.nodes if node.op == "placeholder"]
        weights, given = places[: len(traced.weights)], places[len(traced.weights) :]
        values = [value for node in inputs for value in self._values(graph, node)]
        env: dict[fx.Node, Any] = dict(zip(given, values, strict=True))
        slots: dict[fx.Node, Slot] = {}
        for name, place in zip(traced.weights, weights, strict=True):
            env[place] = graph.get_attr(self.replacement.slot(name))
            env[place].meta = {"val": place.meta["val"]}
            slots[env[place]] = Slot([env[place]])
        self.done.slots += slots.values()
        self._copy(traced, traced.graph, (graph, key), env, slots)
        return [env[node] for node in output_nodes(traced.graph)]

    def _copy(
        self,
        traced: Traced,
        source: fx.Graph,
        into: tuple[fx.Graph, str],
        env: dict[fx.Node, Any],
        slots: dict[fx.Node, Slot],
    ) -> None:
        """Copy the nodes of a traced graph; `slots` knows which nodes of copies are new weights."""
        graph, key = into
        for node in source.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                self._refuse_constant(node)
            if is_cond(node):
                keys = free_keys(key, self.done.graphs)
                given = [env[operand] for operand in operands_of(node)]
                for branch, new in zip(branches_of(node), keys, strict=True):
                    operands = self._branch(traced, traced.branches[branch], new, given, slots)
                env[node] = choose(graph, env[node.args[0]], keys, operands, node.meta["val"])
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = {"val": node.meta.get("val"), **self.meta}

    def _branch(
        self,
        traced: Traced,
        source: fx.Graph,
        key: str,
        given: Sequence[fx.Node],
        slots: dict[fx.Node, Slot],
    ) -> tuple[fx.Node, ...]:
        """Copy a branch of a traced graph; return the operands it takes."""
        graph = self.done.graphs[key] = fx.Graph()
        places = [node for node in source.nodes if node.op == "placeholder"]
        env, operands = begin(graph, places, given)
        for place, value in zip(places, given, strict=True):
            if value in slots and env[place] not in slots:
                slots[env[place]] = slots[value]
                slots[value].nodes.append(env[place])
        self._copy(traced, source, (graph, key), env, slots)
        graph.output(tuple(env[node] for node in output_nodes(source)))
        remove_dead(graph)
        return operands

    def _values(self, graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
        """Return a value, or the values of a node that has several: a trace takes them apart."""
        several = node.meta["val"]
        if not isinstance(several, tuple | list):
            return [node]
        return [self._pick(graph, node, index) for index in range(len(several))]

    def _pick(self, graph: fx.Graph, choice: fx.Node, index: int) -> fx.Node:
        picked = graph.call_function(operator.getitem, (choice, index))
        picked.meta = {"val": choice.meta["val"][index], **self.meta}
        return picked

    def _refuse_constant(self, node: fx.Node) -> None:
        raise VerifyError(
            f"{self.splicer.by}: the replacement makes a tensor inside forward ({node.target}).",
            where=self.replacement.region.label,
            remedy="register it as a buffer of the module.",
        )


def _moved(graph: fx.Graph, region: Region, env: dict[fx.Node, Any]) -> list[fx.Node]:
    """Copy the nodes of a region with the weights they read; return its outputs."""
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source not in env:
                env[source] = graph.node_copy(source)
        env[node] = graph.node_copy(node, env.__getitem__)
    return [env[node] for node in region.outputs]


def _name_slots(done: Spliced) -> None:
    """Give new slots names that no other slot of the graphs has."""
    taken = done.kept
    for slot in done.slots:
        if slot.nodes:
            variants = (slot.name, *(f"{slot.name}#{n}" for n in range(1, len(taken) + 2)))
            slot.rename(next(name for name in variants if name not in taken))
            taken.add(slot.name)


def _check_outputs(region: Region, results: Sequence[fx.Node], by: str) -> None:
    old = [describe(node.meta["val"]) for node in region.outputs]
    new = [describe(node.meta["val"]) for node in results]
    if old != new:
        raise VerifyError(
            f"{by} changed the output from {_shapes(old)} to {_shapes(new)}.",
            where=f"{region.label} (node {region.outputs[0].name})",
            remedy=f"leave this one out with exclude={region.label!r}, and report it.",
        )


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(f"{list(v[0])} {v[1]}" if isinstance(v, tuple) else str(v) for v in values)
