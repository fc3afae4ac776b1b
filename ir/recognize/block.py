"""Residual blocks: sublayers on one or more streams.

x -> x + attention(norm(x)) -> x + feed_forward(norm(x)) -> ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import common_prefix, remembered
from ..program import Program
from ..regions import Region, find_once, local_path, unique_paths
from .attention import Attention
from .branch import Branch
from .calls import readers
from .experts import Experts
from .feed_forward import FeedForward
from .flow import Flow, NotRecognized, flow_of
from .group import Group, groups_of
from .isomorphism import structure_of, weights_of
from .modulation import Modulation, modulations_of, source_of
from .residual import ways_of
from .sublayer import Sublayer, sublayers_of

__all__ = ["Block", "BlockStream", "Sublayer"]


@dataclass(frozen=True)
class BlockStream:
    """A residual stream on its way through a block.

    Attributes:
        stream_in: Its value before the first sublayer on it.
        stream_out: Its value after the last, normalised in a post-norm block; None when it ends
            in the block, as the text of the last block of SD3 does.
    """

    stream_in: fx.Node
    stream_out: fx.Node | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Block(Region):
    """Sublayers on residual streams.

    Attributes:
        sublayers: In execution order.
        streams: In the order in which sublayers add to them, those that end here last.
        modulation: What a condition does to the sublayers, or None.
        gate_kinds: Per sublayer, what its output is multiplied by: `none`, `parameter`
            (LayerScale), `modulation`, or `table` (a shared modulation plus a stored table).
    """

    sublayers: tuple[Sublayer, ...]
    streams: tuple[BlockStream, ...]
    modulation: Modulation | None
    gate_kinds: tuple[str, ...]
    kind: ClassVar[str] = "block"

    @property
    def stream_in(self) -> fx.Node:
        """The first stream before the block."""
        return self.streams[0].stream_in

    @property
    def stream_out(self) -> fx.Node:
        """The first stream after the block."""
        found = self.streams[0].stream_out
        assert found is not None
        return found

    @property
    def structure(self) -> str:
        """Hash of what the block computes, weights and names apart: 16 hexadecimal digits.

        Isomorphic blocks have equal ones.
        """
        key = ("structure", self.outputs[0])
        return remembered(self.nodes[0].graph, key, lambda _: structure_of(self.nodes, self._ends))

    @property
    def weight_nodes(self) -> list[fx.Node]:
        """The `get_attr` nodes it reads: one for one those of isomorphic blocks."""
        key = ("weights", self.outputs[0])
        return remembered(self.nodes[0].graph, key, lambda _: weights_of(self.nodes, self._ends))

    @property
    def _ends(self) -> list[fx.Node]:
        return [stream.stream_out for stream in self.streams if stream.stream_out is not None]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention sublayers."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, Attention))

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forward sublayers."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, FeedForward))

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The feed-forward sublayers that are in experts."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, Experts))

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The sublayers of other kinds."""
        return tuple(s.region for s in self.sublayers if isinstance(s.region, Branch))

    @property
    def norm_place(self) -> str:
        """`pre`, `post`, `sandwich`, `branch`, `none`, or `mixed` when sublayers differ."""
        return _agreed([way.norm_place for s in self.sublayers for way in s.ways])

    @property
    def gate_kind(self) -> str:
        """Of `gate_kinds` the one of all sublayers; `mixed` when they differ."""
        return _agreed(self.gate_kinds)

    @property
    def signs(self) -> tuple[int, ...]:
        """Per sublayer 1 where it is added, -1 where subtracted, 0 where nothing passes by it."""
        return tuple(sublayer.residual.sign for sublayer in self.sublayers)

    @property
    def is_parallel(self) -> bool:
        """Whether sublayers read the same stream side by side."""
        streams = [way.stream for sublayer in self.sublayers for way in sublayer.ways]
        return len(set(streams)) < len(streams)

    @property
    def is_gated(self) -> bool:
        """Whether every sublayer's output is multiplied by a gate: LayerScale, adaLN."""
        return "none" not in self.gate_kinds

    @property
    def shares_output(self) -> bool:
        """Whether parallel sublayers share one output matrix; canonicalize splits it."""
        return any(ffn.shares_down for ffn in self.feed_forwards)

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        names = ("norm_place", "is_parallel", "is_gated", "gate_kinds", "signs", "structure")
        return {
            "sublayers": [sublayer.region.kind for sublayer in self.sublayers],
            "streams": len(self.streams),
            "ends": [i for i, s in enumerate(self.streams) if s.stream_out is None],
            **{name: getattr(self, name) for name in names},
            "modulation": self.modulation and self.modulation.constants(),
        }

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        modulation = self.modulation and self.modulation.bind(program, graph, instance)
        sublayers = tuple(s.bind(program, graph, instance) for s in self.sublayers)
        bound.__dict__.update(sublayers=sublayers, modulation=modulation)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the blocks of a graph."""
        flow = flow_of(graph)
        groups, modulations = groups_of(graph), modulations_of(graph)
        found = [_parts(flow, *pair) for pair in zip(groups, modulations, strict=True)]
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    @classmethod
    def misses(cls, graph: fx.Graph) -> list[NotRecognized]:
        """Say which attentions are no sublayer of a stream, and why."""
        flow = flow_of(graph)
        placed = {s.region.nodes[0] for s in sublayers_of(graph)}
        lost = [a for a in find_once(graph, Attention) if a.nodes[0] not in placed]
        ways = [way for attention in lost for way in ways_of(flow, attention)]
        return [way for way in ways if isinstance(way, NotRecognized)]


def _agreed(found: Any) -> str:
    different = set(found)
    return str(different.pop()) if len(different) == 1 else "mixed"


def _parts(flow: Flow, group: Group, modulation: Modulation | None) -> dict[str, Any]:
    """Return the fields of a block, its path among them."""
    sublayers = group.sublayers
    inside = {n for s in sublayers for n in s.region.nodes}
    inside |= {n for s in sublayers for way in s.ways for n in way.nodes}
    inside |= set(modulation.nodes) if modulation else set()
    inside |= {n for s in sublayers for x in s.ended for n in _entry_nodes(flow, x, inside)}
    ends = [lane.end for lane in group.lanes if lane.end is not None]
    return {
        **flow.enclose(inside, *ends),
        "path": common_prefix(local_path(node) for s in sublayers for node in s.region.nodes),
        "sublayers": tuple(sublayers),
        "streams": tuple(BlockStream(lane.start, lane.end) for lane in group.lanes),
        "modulation": modulation,
        "gate_kinds": tuple(_gate_kind(flow, sublayer) for sublayer in sublayers),
    }


def _entry_nodes(flow: Flow, stream: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Return norm and modulation between a stream that ends in a block and its sublayer."""
    norm = flow.norm_from.get(stream)
    nodes = set(norm.nodes) if norm else set()
    value = norm.outputs[0] if norm else None
    while value is not None and len(following := readers(value)) == 1:
        (value,) = following
        if value in inside:
            return nodes
        nodes.add(value)
    return nodes


def _gate_kind(flow: Flow, sublayer: Sublayer) -> str:
    gates = [way.gate for way in sublayer.ways]
    return _agreed([source_of(flow, gate).kind if gate else "none" for gate in gates])
