"""Residual blocks: sublayers that each add to one stream.

    x -> x + attention(norm(x)) -> x + feed_forward(norm(x)) -> ...

A block ends after its feed-forward network: the next attention begins another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import common_prefix
from ..program import Program
from ..regions import Region, find_once, local_path, unique_paths
from .attention import Attention
from .feed_forward import FeedForward
from .flow import Flow, NotRecognized, flow_of
from .residual import Residual, residual_of


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One branch of a block.

    Attributes:
        region: What it computes.
        residual: How it hangs on the stream: norms, gate, addition.
    """

    region: Attention | FeedForward
    residual: Residual


@dataclass(frozen=True, kw_only=True, eq=False)
class Block(Region):
    """Sublayers on one residual stream.

    Attributes:
        sublayers: In execution order.
        stream_in: The stream before the first.
        stream_out: The stream after the last, normalised in a post-norm block.
    """

    sublayers: tuple[Sublayer, ...]
    stream_in: fx.Node
    stream_out: fx.Node
    kind: ClassVar[str] = "block"

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention sublayers."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, Attention))

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forward sublayers."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, FeedForward))

    @property
    def norm_place(self) -> str:
        """`pre`, `post`, `sandwich`, `branch`, `none`, or `mixed` when sublayers differ."""
        places = {sublayer.residual.norm_place for sublayer in self.sublayers}
        return places.pop() if len(places) == 1 else "mixed"

    @property
    def is_parallel(self) -> bool:
        """Whether sublayers read the same stream side by side."""
        streams = [sublayer.residual.stream for sublayer in self.sublayers]
        return len(set(streams)) < len(streams)

    @property
    def is_gated(self) -> bool:
        """Whether every sublayer's output is multiplied by a gate: LayerScale, adaLN."""
        return all(sublayer.residual.gate is not None for sublayer in self.sublayers)

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        kinds = [sublayer.region.kind for sublayer in self.sublayers]
        names = ("norm_place", "is_parallel", "is_gated")
        return {"sublayers": kinds} | {name: getattr(self, name) for name in names}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        bound.__dict__["sublayers"] = tuple(
            Sublayer(s.region.bind(program, graph, instance), s.residual) for s in self.sublayers
        )
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return runs of sublayers, each run up to its feed-forward network.

        Where an attention belongs to no single stream, feed-forward networks on their own are not
        taken for blocks: they are parts of blocks with several streams.
        """
        flow = flow_of(graph)
        groups: list[list[Sublayer]] = []
        for sublayer in _sublayers(flow):
            if not groups or not _continues(groups[-1], sublayer):
                groups.append([])
            groups[-1].append(sublayer)
        if cls.misses(graph):
            groups = [g for g in groups if any(isinstance(s.region, Attention) for s in g)]
        found = [_parts(flow, group) for group in groups]
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    @classmethod
    def misses(cls, graph: fx.Graph) -> list[NotRecognized]:
        """Say which attentions are no sublayer of a single stream, and why."""
        flow = flow_of(graph)
        ways = [_way(flow, attention) for attention in find_once(graph, Attention)]
        return [way for way in ways if isinstance(way, NotRecognized)]


def _sublayers(flow: Flow) -> list[Sublayer]:
    """Return everything that adds to a stream, in the order of the additions."""
    regions: list[Attention | FeedForward] = [
        *find_once(flow.graph, Attention),
        *find_once(flow.graph, FeedForward),
    ]
    ways = [(region, _way(flow, region)) for region in regions]
    found = [Sublayer(region, way) for region, way in ways if isinstance(way, Residual)]
    order = flow.position
    return sorted(found, key=lambda s: (order[s.residual.total], order[s.region.outputs[0]]))


def _way(flow: Flow, region: Attention | FeedForward) -> Residual | NotRecognized:
    x = region.x_q if isinstance(region, Attention) else region.x
    return residual_of(flow, Block.kind, (x,), region.outputs[0])


def _continues(group: list[Sublayer], new: Sublayer) -> bool:
    """Whether a sublayer belongs to the block that the others began."""
    last = group[-1].residual
    if new.residual.stream is last.stream:
        return True
    chained = new.residual.stream is last.out
    return chained and not isinstance(group[-1].region, FeedForward)


def _parts(flow: Flow, group: list[Sublayer]) -> dict[str, Any]:
    """Return the fields of a block, its path among them."""
    inside = {node for s in group for node in (*s.region.nodes, *s.residual.nodes)}
    out = group[-1].residual.out
    return {
        **flow.enclose(inside, out),
        "path": common_prefix(local_path(node) for s in group for node in s.region.nodes),
        "sublayers": tuple(group),
        "stream_in": group[0].residual.stream,
        "stream_out": out,
    }
