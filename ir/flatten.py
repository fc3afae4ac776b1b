"""Undo the folding: one flat graph, for backends that want it."""

from __future__ import annotations

import keyword
import operator
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .branches import branches_of, choose, free_keys, is_cond, operands_of
from .graphs import argument_positions, copy_graph, output_nodes, remove_dead
from .program import MAIN, Program
from .submodules import add_branches, read_in_branches

Places = dict[tuple[str | None, fx.Node], fx.Node]


def flatten(program: Program) -> Program:
    """Return the program with every block call replaced by the block's nodes."""
    if not program.instances:
        return program
    graphs, _ = flat_graphs(program)
    for graph in graphs.values():
        remove_dead(graph)
    return program.with_(graphs=graphs, instances={})


def flat_graphs(program: Program) -> tuple[dict[str, fx.Graph], Places]:
    """Return main without calls, and where each value is in it, by instance and node.

    Returns:
        Editable graphs by key, main and branches; and the node of each value in one of them.
    """
    flat = _Flat(program)
    flat.graphs[MAIN] = fx.Graph()
    flat.copy(MAIN, None, MAIN, {}, {})
    return flat.graphs, flat.at


def to_module(program: Program) -> fx.GraphModule:
    """Return the flat program as a GraphModule whose parameters keep their names.

    Names that Python would read as others, such as `class` and letters it takes for equal, are told
    apart by a `#` at the end.
    """
    flat = flatten(program)
    return as_module(flat, {**flat.graphs, MAIN: copy_graph(flat.main)})


def as_module(program: Program, graphs: Mapping[str, fx.Graph]) -> fx.GraphModule:
    """Return a module of flat graphs over the tensors of a program; main becomes its own."""
    root, graph = nn.Module(), graphs[MAIN]
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    names = {str(node.target) for node in reads}
    for name in sorted(names | read_in_branches(graph, graphs)):
        tensor = program.tensors[name]
        *path, leaf = readable(name).split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if name in program.parameters and (tensor.is_floating_point() or tensor.is_complex()):
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
    for node in reads:
        node.target = readable(str(node.target))
    add_branches(root, graph, graphs, lambda name: graph.get_attr(readable(name)))
    return fx.GraphModule(root, graph, class_name="Program")


def readable(name: str) -> str:
    """Return a path that code can be generated from; other paths give other results."""
    parts = name.split(".")
    return ".".join(f"{part}#" if _is_odd(part) else part for part in parts)


def _is_odd(part: str) -> bool:
    read_as_another = unicodedata.normalize("NFKC", part) != part
    return keyword.iskeyword(part) or read_as_another or part.endswith("#")


@dataclass
class _Flat:
    """Copies graphs into flat ones.

    Attributes:
        program: Where they are.
        graphs: Main and its branches, without calls.
        at: Where each value is.
    """

    program: Program
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    at: Places = field(default_factory=dict)

    def copy(
        self,
        key: str,
        instance: str | None,
        target: str,
        env: dict[fx.Node, Any],
        weights: dict[str, fx.Node],
    ) -> list[Any]:
        """Copy a graph and all it calls.

        Args:
            key: Which one.
            instance: The block it belongs to.
            target: Key of the flat graph it goes into.
            env: What stands for its placeholders, unless it has its own; filled with the rest.
            weights: Weights that the flat graph reads already.

        Returns:
            What stands for each of its outputs.
        """
        source, graph = self.program.graphs[key], self.graphs[target]
        for node in source.nodes:
            if node.op == "get_attr":
                env[node] = _weight(graph, weights, self._name(instance, node), node)
            elif node.op == "call_module":
                name = str(node.target)
                block = self.program.instances[name].block
                places = argument_positions(self.program.graphs[block])
                inside = {place: env[node.args[index]] for place, index in places.items()}
                env[node] = self.copy(block, name, target, inside, weights)
            elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
                env[node] = env[node.args[0]][node.args[1]]
            elif is_cond(node):
                env[node] = self._choice(node, instance, target, env)
            elif node.op != "placeholder" or node not in env:
                if node.op != "output" or key == MAIN:
                    env[node] = graph.node_copy(node, env.__getitem__)
                if instance is not None and node.op == "call_function":
                    env[node].meta["instance"] = instance
        flat = {n: f for n, f in env.items() if isinstance(f, fx.Node)}
        self.at |= {(instance, node): found for node, found in flat.items()}
        return [env[node] for node in output_nodes(source)]

    def _choice(
        self, node: fx.Node, instance: str | None, target: str, env: dict[fx.Node, Any]
    ) -> fx.Node:
        keys = free_keys(target, self.graphs)
        for branch, key in zip(branches_of(node), keys, strict=True):
            graph = self.graphs[key] = fx.Graph()
            graph.output(tuple(self.copy(branch, instance, key, {}, {})))
        predicate: Any = node.args[0]
        given = [env[operand] for operand in operands_of(node)]
        made = choose(self.graphs[target], env[predicate], keys, given, node.meta["val"])
        made.meta = dict(node.meta)
        return made

    def _name(self, instance: str | None, slot: fx.Node) -> str:
        name = str(slot.target)
        return name if instance is None else self.program.instances[instance].weights[name]


def _weight(graph: fx.Graph, weights: dict[str, fx.Node], name: str, like: fx.Node) -> fx.Node:
    if name not in weights:
        weights[name] = graph.get_attr(name)
        weights[name].meta = dict(like.meta)
    return weights[name]
