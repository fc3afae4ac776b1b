"""Chains: values of one shape, each of which is all that what comes later sees of those before.

    z_0 -> stage 1 -> z_1 -> stage 2 -> z_2 -> ... -> z_n

So a stage can be left out: what would read z_k reads z_(k-1). The streams between the blocks of a
stack are such values; so are the estimates of a model that improves its result brick by brick,
each of them of the shape of the result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from torch import fx

from ..graphs import output_nodes, positions
from ..program import Program
from ..regions import Region
from ..shapes import describe
from .place import Place
from .stack import Stack

Values = tuple[fx.Node, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages(Region):
    """Some stages of a chain, one after the other.

    Attributes:
        before: What they improve: the first of `inputs`. Empty for the stage a chain begins with.
        first: The first of the stages, counted from 1.
        last: The last of them.
        length: How many stages the chain has.
    """

    before: Values
    first: int
    last: int
    length: int
    kind: ClassVar[str] = "stage"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return nothing: a chain belongs to a program, not to one graph."""
        return []


@dataclass(frozen=True, eq=False)
class Chain:
    """Values that improve on each other, in the main graph.

    Attributes:
        values: z_0 to z_n, several nodes each where there are several streams. z_0 is empty when
            there is nothing the first stage could be left out for.
        label: What the stages are called, with their number behind it.
        program: Where it was found.
    """

    values: tuple[Values, ...]
    label: str
    program: Program

    @property
    def length(self) -> int:
        """The number of stages."""
        return len(self.values) - 1

    def stages(self, first: int, last: int, extra: Sequence[fx.Node] = ()) -> Stages:
        """Return stages as one region.

        Args:
            first: The first, counted from 1.
            last: The last; `first` for one stage.
            extra: Values of main that a replacement reads besides; they become the last inputs.
        """
        before, after = self.values[first - 1], self.values[last]
        nodes = _only_for(after, before)
        inside = {*nodes, *before, *extra}
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        others = [n for n in read if n not in inside and n.op != "get_attr"]
        name = f"{self.label}_{first}" + (f"_to_{last}" if last > first else "")
        return Stages(
            path=name,
            nodes=nodes,
            inputs=(*before, *others, *extra),
            outputs=after,
            program=self.program,
            before=before,
            first=first,
            last=last,
            length=self.length,
        )


def estimates_of(program: Program) -> Chain | None:
    """Return the chain of values of the shape of the result that ends in it; None without one.

    Of values with no weights between them the last one counts.
    """
    results = output_nodes(program.main)
    if len(results) != 1:
        return None
    (last,) = results
    shape = describe(last.meta["val"])
    way: dict[fx.Node | None, Values] = {None: ()}  # alike values on the way to the result
    for node, behind in _behind(program.main).items():
        alike = node.op == "call_function" and describe(node.meta.get("val")) == shape
        way[node] = (node, *way[behind]) if alike else way[behind]
    longest = max((w for w in way.values() if w[-1:] == (last,)), key=len, default=())
    kept = [node for node, after in pairwise(longest) if _weighs(node, after)]
    if not kept:
        return None
    return Chain(((), *((node,) for node in kept), (last,)), "brick", program)


def blocks_of(stack: Stack) -> Chain | None:
    """Return the chain of a stack's streams; None where a stream ends or is not in main."""
    values: list[Values] = []
    for cut in stack.cuts:
        found = [None if place is None else in_main(stack.program, place) for place in cut]
        nodes = tuple(node for node in found if node is not None)
        if len(nodes) < len(found):
            return None
        values.append(nodes)
    shapes = {tuple(str(describe(n.meta["val"])) for n in nodes) for nodes in values}
    return Chain(tuple(values), "block", stack.program) if len(shapes) == 1 else None


def in_main(program: Program, place: Place) -> fx.Node | None:
    """Return the node of main that holds a value."""
    if place.instance is None:
        return place.node if place.node.graph is program.main else None
    call = program.call(place.instance)
    results = output_nodes(program.graphs[program.instances[place.instance].block])
    picks = [user for user in call.users if results[user.args[1]] is place.node]  # type: ignore[index]
    return picks[0] if picks and call.graph is program.main else None


def _only_for(targets: Values, before: Values) -> tuple[fx.Node, ...]:
    """Return what nothing but some values is computed for, without what they improve."""
    order = positions(targets[0].graph)
    inside: set[fx.Node] = set()
    pending = [(-order[node], node.name, node) for node in targets]
    heapq.heapify(pending)
    while pending:  # later nodes first, so all readers of a node are known when it comes
        *_, node = heapq.heappop(pending)
        free = node in targets or (node not in before and inside.issuperset(node.users))
        if node in inside or not free or node.op not in ("call_function", "call_module"):
            continue
        inside.add(node)
        for source in node.all_input_nodes:
            heapq.heappush(pending, (-order[source], source.name, source))
    return tuple(sorted(inside, key=order.__getitem__))


def _weighs(before: fx.Node, after: fx.Node) -> bool:
    """Whether weights lie between two values of a chain."""
    nodes = _only_for((after,), (before,))
    sources = (source for node in nodes for source in node.all_input_nodes)
    return any(node.op == "call_module" for node in nodes) or any(
        s.op == "get_attr" for s in sources
    )


def _behind(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """Return for each node that is read the nearest one that all ways to the result lead through.

    That is its immediate postdominator; None stands for the end, behind all results.
    """
    behind: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node in reversed(graph.nodes):
        if node.op == "output":
            continue
        users = [None if user.op == "output" else user for user in node.users]
        known = [user for user in users if user in depth]
        if not known:
            continue
        meet = known[0]
        for user in known[1:]:
            other: fx.Node | None = user
            while meet is not other:
                if depth[meet] >= depth[other]:
                    meet = behind[meet] if meet is not None else None
                else:
                    other = behind[other] if other is not None else None
        behind[node], depth[node] = meet, depth[meet] + 1
    return behind
