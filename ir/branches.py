"""Choices in a program: a node that computes one of two graphs.

    y = cond(p, "main.if0", "main.else0", (x, h))        the first graph where p holds

A branch is a graph in the scope of the one it is called from. Values come in as operands, one for
each of its placeholders; weights are named as everywhere: a `get_attr` node of a branch of `main`
names a tensor, that of a branch of a class is a slot of the same instance. So an instance does not
know whether its block chooses, and no tensor has a second name. A branch of main may call block
instances. Each branch is called from one place, and both return values of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .graphs import output_nodes, remembered

COND = torch.ops.higher_order.cond
Graphs = Mapping[str, fx.Graph]


def is_cond(node: fx.Node) -> bool:
    """Whether a node computes one of two graphs."""
    return node.target is COND


def branches_of(node: fx.Node) -> tuple[str, str]:
    """Return the keys of the graphs a choice is between, first the one for true."""
    return str(node.args[1]), str(node.args[2])


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the values a choice passes to whichever graph is computed."""
    operands: Any = node.args[3]
    return tuple(operands)


def choices(graph: fx.Graph) -> list[fx.Node]:
    """Return the choices of a graph of a Program, in order."""
    return remembered(graph, COND, lambda g: [node for node in g.nodes if is_cond(node)])


def scope(graphs: Graphs, key: str) -> list[str]:
    """Return a graph's key and those of all branches below it, callers first."""
    keys = [key]
    for found in keys:  # grows while it is walked
        keys += [branch for node in choices(graphs[found]) for branch in branches_of(node)]
    return keys


def executed(graphs: Graphs, key: str) -> Iterator[fx.Node]:
    """Yield the nodes of a graph and of its branches, as if both branches were computed."""
    for node in graphs[key].nodes:
        yield node
        if is_cond(node):
            for branch in branches_of(node):
                yield from executed(graphs, branch)


def complaint(graphs: Graphs, roots: Collection[str]) -> tuple[str, fx.Node | None] | None:
    """Say what is wrong with how graphs call their branches, and where; None when all is well.

    Args:
        graphs: All graphs of a program.
        roots: Those that are called in other ways: `main` and the classes.
    """
    caller: dict[str, fx.Node] = {}
    for graph in graphs.values():
        for node in choices(graph):
            if not _well_formed(node):
                return f"{node.name} is no choice between two graphs", node
            for branch in branches_of(node):
                if branch not in graphs or branch in roots:
                    return f"{node.name} names a branch that does not exist, {branch[:80]!r}", node
                if caller.setdefault(branch, node) is not node or len({*branches_of(node)}) < 2:
                    return f"{node.name} shares the branch {branch[:80]!r}", node
    pending = list(roots)
    for key in pending:  # grows while it is walked; ends, as each branch has one caller
        pending += [b for node in choices(graphs[key]) for b in branches_of(node)]
    lost = sorted(graphs.keys() - pending)
    return (f"nobody calls the graph {lost[0][:80]!r}", None) if lost else None


def begin(
    graph: fx.Graph, places: Sequence[fx.Node], given: Sequence[Any]
) -> tuple[dict[fx.Node, Any], tuple[fx.Node, ...]]:
    """Begin a branch from one whose operands are weights, numbers and values alike.

    Args:
        graph: Empty; gets a placeholder for each value and a `get_attr` node for each weight.
        places: Placeholders of the branch as traced.
        given: What each is given, in the graph that chooses.

    Returns:
        What stands for each placeholder, and the operands that are left.
    """
    inside: dict[fx.Node, fx.Node] = {}
    env: dict[fx.Node, Any] = {}
    values = dict.fromkeys(g for g in given if isinstance(g, fx.Node) and g.op != "get_attr")
    for number, value in enumerate(values):
        inside[value] = graph.placeholder(f"x{number}" if len(values) > 1 else "x")
    for value in dict.fromkeys(g for g in given if isinstance(g, fx.Node) and g.op == "get_attr"):
        inside[value] = graph.get_attr(str(value.target))
    for value, node in inside.items():
        node.meta = {"val": value.meta["val"]}
    for place, value in zip(places, given, strict=True):
        env[place] = inside[value] if isinstance(value, fx.Node) else value
    return env, tuple(values)


def without_unread(graphs: Sequence[fx.Graph], operands: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Take the operands that no branch reads away from both; return those that are left."""
    kept = []
    rows = [[n for n in graph.nodes if n.op == "placeholder"] for graph in graphs]
    for operand, *places in zip(operands, *rows, strict=True):
        if any(place.users for place in places):
            kept.append(operand)
        else:
            for graph, place in zip(graphs, places, strict=True):
                graph.erase_node(place)
    return tuple(kept)


def choose(
    graph: fx.Graph, predicate: fx.Node, keys: tuple[str, str], operands: Sequence[fx.Node],
    values: Sequence[Any],
) -> fx.Node:  # fmt: skip
    """Append a choice to a graph that is being made; its value is a tuple."""
    node = graph.call_function(COND, (predicate, *keys, tuple(operands)))
    node.meta["val"] = tuple(values)
    return node


def free_keys(owner: str, taken: Collection[str]) -> tuple[str, str]:
    """Return keys for the branches of another choice of a graph."""
    number = next(n for n in range(len(taken) + 1) if f"{owner}.if{n}" not in taken)
    return f"{owner}.if{number}", f"{owner}.else{number}"


def with_keys(graph: fx.Graph, rename: Callable[[str], str]) -> None:
    """Give the branches of an editable graph other keys."""
    for node in graph.nodes:
        if is_cond(node):
            predicate, first, second, operands = node.args
            node.args = (predicate, rename(str(first)), rename(str(second)), operands)


def returned(graph: fx.Graph) -> list[Any]:
    """Return the recorded values of what a graph returns."""
    return [node.meta["val"] for node in output_nodes(graph)]


def _well_formed(node: fx.Node) -> bool:
    if len(node.args) != 4 or node.kwargs:
        return False
    predicate, first, second, operands = node.args
    return (
        isinstance(predicate, fx.Node)
        and isinstance(first, str)
        and isinstance(second, str)
        and isinstance(operands, tuple | list)
        and all(isinstance(operand, fx.Node) for operand in operands)
    )
