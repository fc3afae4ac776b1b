"""Which sublayers make a block.

A block ends, stream by stream, behind its feed-forward network. Where there is none, a sublayer
like one that the block already has begins the next. Feed-forward networks alone are no block where
they alternate with blocks: in

    network, attention, convolution, network, network, attention, convolution, network, ...

what repeats is the block (a Conformer's); so is a class of blocks that holds no more than
networks before or after one block.

Source: Lu et al., 2019 (Macaron), arXiv:1906.02762; Gulati et al., 2020, arXiv:2005.08100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from ..graphs import remembered
from .experts import Experts
from .feed_forward import FeedForward
from .flow import Flow, flow_of
from .path import value_of
from .residual import Residual
from .sublayer import Sublayer, sublayers_of


@dataclass
class Lane:
    """One stream on its way through a block.

    Attributes:
        start: The stream before the first sublayer on it.
        end: The stream after the last; None when it ends in the block.
        last: The stream that the last sublayer on it has read.
        closed: Whether the last sublayer ends the block.
        known: What the sublayers on it look like.
    """

    start: fx.Node
    end: fx.Node | None
    last: fx.Node
    closed: bool = False
    known: set[object] = field(default_factory=set)


@dataclass
class Group:
    """Sublayers of one block, and its streams."""

    sublayers: list[Sublayer] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)

    def accepts(self, new: Sublayer) -> bool:
        """Whether a sublayer continues this block: beside the last one on its stream, or after."""
        streams = {value_of(way.stream) for way in new.ways}
        if self._lanes(streams, "last"):
            return True
        after = self._lanes(streams, "end")
        return any(not lane.closed and new.signature not in lane.known for lane in after)

    def add(self, new: Sublayer) -> None:
        """Put a sublayer at the end of its streams."""
        self.sublayers.append(new)
        for way in new.ways:
            lane = self._lane(way)
            lane.end, lane.last = way.out, way.stream
            lane.closed |= new.closes
            lane.known.add(new.signature)
        self.lanes += [Lane(start, None, start, closed=True) for start in new.ended]

    def _lane(self, way: Residual) -> Lane:
        for name in ("end", "last"):
            for lane in self._lanes({value_of(way.stream)}, name):
                return lane
        self.lanes.append(Lane(way.stream, way.stream, way.stream))
        return self.lanes[-1]

    def _lanes(self, streams: set[fx.Node], name: str) -> list[Lane]:
        ends = [(lane, getattr(lane, name)) for lane in self.lanes]
        return [lane for lane, end in ends if end is not None and value_of(end) in streams]


def groups_of(graph: fx.Graph) -> list[Group]:
    """Return the sublayers of each block of a graph, in order."""
    return list(remembered(graph, Group, _groups))


def _groups(graph: fx.Graph) -> list[Group]:
    groups: list[Group] = []
    at: dict[fx.Node, Group] = {}
    for sublayer in sublayers_of(graph):
        read = [value_of(way.stream) for way in sublayer.ways]
        open_ = (at[value] for value in read if value in at)
        group = next((group for group in open_ if group.accepts(sublayer)), None)
        if group is None:
            group = Group()
            groups.append(group)
        group.add(sublayer)
        at.update(dict.fromkeys((*read, *(value_of(way.out) for way in sublayer.ways)), group))
    order = flow_of(graph).position
    groups.sort(key=lambda g: min(order[s.region.nodes[0]] for s in g.sublayers))
    return [joined for run in _runs(flow_of(graph), groups) for joined in _joined(run)]


def _runs(flow: Flow, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Yield groups on one stream each, that continue each other."""
    run: list[Group] = []
    for group in groups:
        if run and not _follows(flow, run[-1], group):
            yield run
            run = []
        run.append(group)
    yield run


def _follows(flow: Flow, one: Group, other: Group) -> bool:
    """Whether a group of one stream continues the stream of another, perhaps normalised."""
    end, start = one.lanes[0].end, value_of(other.lanes[0].start)
    norm = flow.norm_to.get(start)
    starts = [start, *([value_of(norm.inputs[0])] if norm else [])]
    alone = len(one.lanes) == len(other.lanes) == 1
    return alone and end is not None and value_of(end) in starts


def _joined(run: Sequence[Group]) -> Iterator[Group]:
    """Yield the blocks of a run: what repeats, if networks alone are a part of it."""
    lone = [all(isinstance(s.region, FeedForward | Experts) for s in g.sublayers) for g in run]
    length = 1
    if any(lone) and not all(lone):
        period = period_of([tuple(s.signature for s in g.sublayers) for g in run])
        length = period or (2 if len(run) == 2 else 1)
        length = length if len(run) % length == 0 else 1
    for first in range(0, len(run), length):
        parts = run[first : first + length]
        whole = Group()
        for sublayer in (s for part in parts for s in part.sublayers):
            whole.add(sublayer)
        yield whole if length > 1 else parts[0]


def period_of(keys: Sequence[object]) -> int | None:
    """Return the shortest period of a sequence that repeats, in linear time; None if none does.

    A prefix that is a suffix as well leaves a period in front of it.
    """
    border = [0] * len(keys)
    for i in range(1, len(keys)):
        length = border[i - 1]
        while length and keys[i] != keys[length]:
            length = border[length - 1]
        border[i] = length + (keys[i] == keys[length])
    period = len(keys) - border[-1]
    return period if 2 * period <= len(keys) else None
