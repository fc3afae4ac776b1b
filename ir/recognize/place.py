"""Values of a whole program, whichever graph their node is in.

A value that a block returns is a node of its class graph, seen through the instance; what main
picks from the call, and what the next block is called with, are the same value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

from ..graphs import output_nodes
from ..program import Program
from .calls import CARRYING, op
from .flow import flow_of

LONGEST = 24  # nodes looked at between two blocks


class Place(NamedTuple):
    """A value: a node, and the instance it is looked at through; None in the main graph."""

    instance: str | None
    node: fx.Node


def made_at(program: Program, place: Place) -> Place:
    """Follow a value through calls to the node that computes it."""
    while True:
        instance, node = place
        given = program.given(instance, node) if node.op == "placeholder" else None
        if given is not None:
            place = Place(*given)
        elif instance is None and op(node) == "getitem" and _calls(node.args[0]):
            picked: Any = node.args
            name = str(picked[0].target)
            graph = program.graphs[program.instances[name].block]
            place = Place(name, output_nodes(graph)[picked[1]])
        else:
            return place


def sources_of(program: Program, place: Place, stop: set[Place]) -> Iterator[Place]:
    """Yield which of some values a value is laid out, normalised or joined of."""
    pending = [place]
    for place in pending:  # grows while it is walked
        found = made_at(program, place)
        if found in stop:
            yield found
        elif len(pending) < LONGEST:
            sources = found.node.all_input_nodes
            norm = flow_of(found.node.graph).norm_to.get(found.node)
            several = sources if op(found.node) == "cat" else norm.inputs[:1] if norm else ()
            several = sources[:1] if op(found.node) in CARRYING else several
            pending += [Place(found.instance, node) for node in several]


def _calls(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module"
