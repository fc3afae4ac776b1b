"""Branches as torch's own `cond` takes them: submodules whose weights are operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from .branches import branches_of, is_cond, operands_of, scope
from .cost import is_view
from .graphs import aten, copy_graph, output_nodes

Graphs = Mapping[str, fx.Graph]


def read_in_branches(graph: fx.Graph, graphs: Graphs) -> set[str]:
    """Return the names of the weights that the branches of a flat graph read, however deep."""
    keys = [key for node in graph.nodes if is_cond(node) for key in branches_of(node)]
    below = [graphs[found] for key in keys for found in scope(graphs, key)]
    return {str(node.target) for each in below for node in each.nodes if node.op == "get_attr"}


def add_branches(
    owner: nn.Module, graph: fx.Graph, graphs: Graphs, read: Callable[[str], fx.Node]
) -> None:
    """Put modules in the place of the branches that a graph names.

    Args:
        owner: Module of the graph, which gets the submodules.
        graph: Flat, editable.
        graphs: Branches by key; they stay as they are.
        read: Returns a node of the graph for a weight, made at the insertion point if need be.
    """
    for number, node in enumerate([node for node in graph.nodes if is_cond(node)]):
        predicate, operands, keys = node.args[0], operands_of(node), branches_of(node)
        names = sorted({name for key in keys for name in _read_below(graphs, key)})
        modules = []
        with graph.inserting_before(node):
            given = [read(name) for name in names]
            operands = tuple(_in_order(graph, operand) for operand in operands)
            for label, key in zip(("if", "else"), keys, strict=True):
                owner.add_module(f"#{label}{number}", _module(graphs, key, names))
                modules.append(graph.get_attr(f"#{label}{number}"))
        node.args = (predicate, *modules, (*operands, *given))


def _in_order(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """Lay an operand out in order: Inductor gives branches other strides than they compute with."""
    value = operand.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return operand
    node = graph.call_function(aten.contiguous.default, (operand,))
    node.meta["val"] = value
    return node


def _module(graphs: Graphs, key: str, names: list[str]) -> fx.GraphModule:
    """Return a branch as a module that takes its operands, then the weights of both branches."""
    graph = copy_graph(graphs[key])
    places = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    weights: dict[str, fx.Node] = {}
    with graph.inserting_before(places[-1].next if places else first):
        for number, name in enumerate(names):
            weights[name] = graph.placeholder(f"weight_{number}")
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        weights[str(node.target)].meta = dict(node.meta)
        node.replace_all_uses_with(weights[str(node.target)])
        graph.erase_node(node)
    _own_results(graph)
    owner = nn.Module()
    add_branches(owner, graph, graphs, weights.__getitem__)
    return fx.GraphModule(owner, graph, class_name="Branch")


def _own_results(graph: fx.Graph) -> None:
    """Copy results that are inputs or views of them: compilers let branches share no memory."""
    results: list[fx.Node] = []
    for node in output_nodes(graph):
        source: Any = node
        while source.op == "call_function" and is_view(source) and source.args:
            source = source.args[0]
        if source.op == "placeholder" or node in results:
            with graph.inserting_before(graph.output_node()):
                node, value = graph.call_function(aten.clone.default, (node,)), node.meta["val"]
            node.meta["val"] = value
        results.append(node)
    graph.output_node().args = (tuple(results),)


def _read_below(graphs: Graphs, key: str) -> set[str]:
    nodes = (node for found in scope(graphs, key) for node in graphs[found].nodes)
    return {str(node.target) for node in nodes if node.op == "get_attr"}
