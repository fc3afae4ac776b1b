"""What stands between two values."""

from __future__ import annotations

from typing import Any

from torch import fx

from .calls import LAYOUT, SPLITS, peel
from .flow import Flow

_SAME = LAYOUT - SPLITS - {"slice", "select", "narrow", "getitem", "expand", "repeat_interleave"}
LARGEST = 256  # nodes between two values that are looked at


def value_of(node: fx.Node) -> fx.Node:
    """Return what a node holds all of, however it is laid out."""
    return peel(node, _SAME)


def layout_between(value: Any, source: fx.Node) -> set[fx.Node]:
    """Return the nodes that lay out `source` as `value`: each reads the next as its first argument.

    Args:
        value: What `calls.peel` was given.
        source: What it returned.
    """
    nodes: set[fx.Node] = set()
    while value is not source:
        nodes.add(value)
        value = value.args[0]
    return nodes


def nodes_between(flow: Flow, start: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """Return all nodes on the way from one value to another, `end` among them.

    Empty when `end` is not made of `start`, when calls lie on the way, and when it is longer than
    `LARGEST`.
    """
    position, first = flow.position, flow.position[start]
    seen, pending = {end}, [end]
    while pending:
        node = pending.pop()
        if node.op == "call_module" or len(seen) > LARGEST:
            return frozenset()
        for source in node.all_input_nodes:
            if source not in seen and position[source] > first and source.op != "get_attr":
                seen.add(source)
                pending.append(source)
    made: set[fx.Node] = set()
    for node in sorted(seen, key=position.__getitem__):
        if any(source is start or source in made for source in node.all_input_nodes):
            made.add(node)
    return frozenset(made) if end in made else frozenset()
