"""Regions that share nodes, as one: attention and network side by side, into one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...ir.graphs import positions
from ...ir.regions import Region


def apart(regions: Sequence[Region]) -> list[Region]:
    """Return regions of one graph in order, those that share nodes joined."""
    groups: list[list[Region]] = []
    for region in regions:
        touched = [g for g in groups if any(not set(r.nodes).isdisjoint(region.nodes) for r in g)]
        groups = [group for group in groups if group not in touched]
        groups.append([*(r for group in touched for r in group), region])
    return [group[0] if len(group) == 1 else joined(group) for group in groups]


def joined(regions: Iterable[Region]) -> Region:
    """Return several regions of one graph as one, with what is made of their outputs alone."""
    first, *others = regions
    every = (first, *others)
    order = positions(first.program.graphs[first.graph])
    inside = {node for region in every for node in region.nodes}
    for node in order:
        values = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.op == "call_function" and values and inside.issuperset(values):
            inside.add(node)
    nodes = tuple(sorted(inside, key=order.__getitem__))
    return Region(
        path=first.path,
        nodes=nodes,
        inputs=tuple(dict.fromkeys(n for r in every for n in r.inputs if n not in inside)),
        outputs=tuple(node for node in nodes if not inside.issuperset(node.users)),
        graph=first.graph,
        instance=first.instance,
        program=first.program,
    )
