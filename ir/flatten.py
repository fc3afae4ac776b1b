"""Undo the folding: one flat graph, for backends that want it."""

from __future__ import annotations

import keyword
import operator
import unicodedata
from typing import Any

from torch import fx, nn

from .graphs import copy_graph, output_nodes, remove_dead
from .program import MAIN, Program


def flatten(program: Program) -> Program:
    """Return the program with every block call replaced by the block's nodes."""
    if not program.instances:
        return program
    graph = fx.Graph()
    weights: dict[str, fx.Node] = {}
    env: dict[fx.Node, Any] = {}
    for node in program.main.nodes:
        if node.op == "call_module":
            env[node] = _inline(
                program, str(node.target), [env[a] for a in node.args], graph, weights
            )
        elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "get_attr":
            env[node] = _weight(graph, weights, str(node.target), node)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    remove_dead(graph)
    return program.with_(graphs={MAIN: graph}, instances={})


def to_module(program: Program) -> fx.GraphModule:
    """Return the flat program as a GraphModule whose parameters keep their names.

    Names that Python would read as others, such as `class` and letters it takes for equal, are told
    apart by a `#` at the end.
    """
    flat = flatten(program)
    graph = copy_graph(flat.main)
    root = nn.Module()
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    for name in sorted({str(node.target) for node in reads}):
        tensor = flat.tensors[name]
        *path, leaf = _readable(name).split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if name in flat.parameters and (tensor.is_floating_point() or tensor.is_complex()):
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
    for node in reads:
        node.target = _readable(str(node.target))
    return fx.GraphModule(root, graph, class_name="Program")


def _readable(name: str) -> str:
    """Return a path that code can be generated from; other paths give other results."""
    parts = name.split(".")
    return ".".join(f"{part}#" if _is_odd(part) else part for part in parts)


def _is_odd(part: str) -> bool:
    read_as_another = unicodedata.normalize("NFKC", part) != part
    return keyword.iskeyword(part) or read_as_another or part.endswith("#")


def _inline(
    program: Program,
    name: str,
    inputs: list[fx.Node],
    graph: fx.Graph,
    weights: dict[str, fx.Node],
) -> list[fx.Node]:
    """Copy the nodes of an instance's class into `graph`; return the block's outputs."""
    instance = program.instances[name]
    given = iter(inputs)
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graphs[instance.block].nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = _weight(graph, weights, instance.weights[str(node.target)], node)
        elif node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta["instance"] = name
    return [env[node] for node in output_nodes(program.graphs[instance.block])]


def _weight(graph: fx.Graph, weights: dict[str, fx.Node], name: str, like: fx.Node) -> fx.Node:
    if name not in weights:
        weights[name] = graph.get_attr(name)
        weights[name].meta = dict(like.meta)
    return weights[name]
