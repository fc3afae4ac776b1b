"""Sublayers: whatever reads a residual stream and adds to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..graphs import remembered
from ..program import Program
from ..regions import find_once
from .attention import Attention
from .branch import Branch, loose_ends
from .calls import shape
from .entry import Behind
from .experts import Experts, way_of
from .feed_forward import FeedForward
from .flow import Flow, flow_of
from .residual import Residual, residual_of, ways_of

Part = Attention | FeedForward | Experts | Branch


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sublayer of a block.

    Attributes:
        region: What it computes.
        residuals: How it hangs on each of its streams: norms, modulation, gate, addition. One,
            or one per stream of a joint attention; None for a stream that ends in it.
        ended: What it reads of the streams that end in it, in their order.
    """

    region: Part
    residuals: tuple[Residual | None, ...]
    ended: tuple[fx.Node, ...] = ()

    @property
    def residual(self) -> Residual:
        """How it hangs on the first of its streams."""
        return self.ways[0]

    @property
    def ways(self) -> tuple[Residual, ...]:
        """How it hangs on the streams that go on."""
        return tuple(way for way in self.residuals if way is not None)

    @property
    def closes(self) -> bool:
        """Whether a block ends behind it: a feed-forward network over channels."""
        if isinstance(self.region, Experts):
            return True
        return isinstance(self.region, FeedForward) and self.region.axis == "channels"

    @property
    def signature(self) -> tuple[object, ...]:
        """Return what it has in common with the same sublayer of another block."""
        region = self.region
        if isinstance(region, Attention):
            names = ("heads", "kv_heads", "head_dim", "source")
            shapes: tuple[object, ...] = tuple(map(shape, region.core.all_input_nodes))
            return region.kind, *(getattr(region, name) for name in names), repr(shapes)
        return region.kind, repr(region.constants()), repr(shape(self.residual.stream))

    def bind(self, program: Program, graph: str, instance: str | None) -> Sublayer:
        """Return the same sublayer looked at through an instance."""
        region = self.region.bind(program, graph, instance)
        return Sublayer(region, self.residuals, self.ended)


def sublayers_of(graph: fx.Graph) -> list[Sublayer]:
    """Return everything that adds to a stream, in the order of the additions."""
    return list(remembered(graph, Sublayer, _sublayers))


def _sublayers(graph: fx.Graph) -> list[Sublayer]:
    flow = flow_of(graph)
    found: list[Sublayer] = []
    for network in find_once(graph, FeedForward):
        way = residual_of(flow, network.kind, (network.x,), network.down_layer.node)
        found += [Sublayer(network, (way,))] if isinstance(way, Residual) else []
    for experts in find_once(graph, Experts):
        straight = way_of(flow, experts.x, experts.y)
        found += [Sublayer(experts, (straight,))] if straight else []
    for attention in find_once(graph, Attention):
        found += _joint(flow, attention)
    for way, held in loose_ends(graph):
        found += [Sublayer(region, (way,)) for region in held]
    found += [Sublayer(branch, (branch.residual,)) for branch in find_once(graph, Branch)]
    order = flow.position
    first = {s: min(order[way.total] for way in s.ways) for s in found}
    return sorted(found, key=lambda s: (first[s], order[s.region.outputs[0]]))


def _joint(flow: Flow, attention: Attention) -> list[Sublayer]:
    """Return the sublayer an attention is if each of its streams goes on or ends in it."""
    ways = ways_of(flow, attention)
    known = tuple(way for way in ways if way is None or isinstance(way, Residual))
    if len(known) < len(ways) or not any(known):
        return []
    ended = tuple(
        _entry(flow, stream.x_k)
        for stream, way in zip(attention.streams, ways, strict=True)
        if way is None
    )
    return [Sublayer(attention, known, ended)]


def _entry(flow: Flow, value: fx.Node) -> fx.Node:
    """Return the stream a value was made of by a norm and its modulation."""
    return next(
        (flow.norm_to[node].inputs[0] for node in Behind(flow, (value,)) if node in flow.norm_to),
        value,
    )
