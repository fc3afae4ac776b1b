"""Attention: from the projections to the output projection.

q = x_q @ Wq.T    k = x_k @ Wk.T    v = x_v @ Wv.T    y = softmax(scale * q @ k.T + mask) @ v @ Wo.T
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import fx

from ..program import Program
from ..regions import Region, unique_paths
from .calls import arguments, joint_path, op, shape
from .convolution import is_reduced
from .core import Core, Term, cores_of
from .exits import exits_of
from .features import sizes
from .flow import Flow, NotRecognized, flow_of
from .layer import Layer
from .mask import Mask, mask_of
from .norm import Norm
from .rotary import Rotary
from .streams import ROLES, Side, Stream, sides_of, stream_of

__all__ = ["Attention", "Stream"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention(Region):
    """Multi-head attention.

    A constant that the graph does not settle is None. A region has one output per stream: its
    `result`, the result of the output projection.

    Attributes:
        core: The node that computes the attended values: `scaled_dot_product_attention`, or the
            second product of an attention that is spelled out.
        streams: The sequences that attend, in the order they are joined: one in ordinary attention,
            self or cross; several in joint attention.
        x_q: What queries are made of: the projection's input, or the value itself without one; the
            joined queries of several streams.
        x_k: What keys are made of.
        x_v: What values are made of.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a query and a key head.
        value_dim: Width of a value head.
        scale: Number each score is multiplied by, scalar factors on queries and keys included.
        softcap: c, where scores are replaced by c * tanh(scores / c); else None.
        masks: What is added to the scores or chooses among them.
        is_causal: Whether a flag of the op makes it causal.
        source: `self` when queries, keys and values are made of one value, or keys and values of
            the same with fewer tokens, as in PVT; `cross` when keys and values share another;
            `joint` for several streams; `mixed` for anything else.
        rotary: How queries and keys are rotated by their positions.
    """

    core: fx.Node
    streams: tuple[Stream, ...]
    x_q: fx.Node
    x_k: fx.Node
    x_v: fx.Node
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    value_dim: int | None
    scale: float | None
    softcap: float | None
    masks: tuple[Term, ...]
    is_causal: bool
    source: str
    rotary: Rotary
    kind: ClassVar[str] = "attention"

    @property
    def query(self) -> Layer | None:
        """Projection of the queries; None without one, or with one per stream."""
        return self._only("query")

    @property
    def key(self) -> Layer | None:
        """Projection of the keys; None without one, or with one per stream."""
        return self._only("key")

    @property
    def value(self) -> Layer | None:
        """Projection of the values; None without one, or with one per stream."""
        return self._only("value")

    @property
    def output(self) -> Layer | None:
        """Projection of the joined heads; None without one, or with one per stream."""
        return self._only("output")

    @property
    def query_norm(self) -> Norm | None:
        """Norm of the queries; None without one, or with one per stream."""
        return self._only("query_norm")

    @property
    def key_norm(self) -> Norm | None:
        """Norm of the keys; None without one, or with one per stream."""
        return self._only("key_norm")

    def _only(self, name: str) -> Any:
        return getattr(self.streams[0], name) if len(self.streams) == 1 else None

    @property
    def mask(self) -> str:
        """What masks the scores.

        `none`, `causal`, `window` (causal, of `window` keys), `padding` (keys an input masks out,
        for every query alike), `bias` (numbers added to them), several joined by `+`, or `input`
        for a value `mask_node` that was not proved to be any of these. What depends on an input
        was tried with ones and zeros only.
        """
        return self._mask.kind

    @property
    def window(self) -> int | None:
        """Keys that a query sees in a causal window, itself included; else None."""
        return self._mask.window

    @property
    def mask_node(self) -> fx.Node | None:
        """The mask; the outermost one of several."""
        return self.masks[0].node if self.masks else None

    @cached_property
    def _mask(self) -> Mask:
        return mask_of(self.program, self.instance, self.masks, self.is_causal)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The projections there are, stream by stream: query, key, value, output."""
        return tuple(layer for stream in self.streams for layer in stream.layers)

    @property
    def qk_norm(self) -> bool | None:
        """Whether queries and keys are normalised; None when their projections are unknown."""
        if all(stream.query_norm and stream.key_norm for stream in self.streams):
            return True
        return False if all(stream.query and stream.key for stream in self.streams) else None

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        names = ("heads", "kv_heads", "head_dim", "scale", "mask", "source", "qk_norm")
        return {name: getattr(self, name) for name in names} | {"rotary": self.rotary.to_json()}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        streams = tuple(stream.bind(program, graph, instance) for stream in self.streams)
        bound.__dict__["streams"] = streams
        bound.__dict__.pop("_mask", None)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return one region per attention, as one op or spelled out."""
        flow = flow_of(graph)
        found = [_parts(flow, core) for core in cores_of(graph)]
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    def misses(self) -> list[NotRecognized]:
        """Say which parts of the pattern are not there, each with the node in their place."""
        return [miss for stream in self.streams for miss in _misses(stream, self.core)]


def _misses(stream: Stream, core: fx.Node) -> list[NotRecognized]:
    found = []
    for role in ROLES:
        layer: Layer | None = getattr(stream, role)
        if layer is None:
            node = getattr(stream, f"x_{role[0]}")
            joins = "joins several projections" if op(node) == "cat" else "is no linear layer"
            found.append(NotRecognized(f"attention.{role}", node, joins))
        elif layer.rows is None:
            reason = "holds its output features in no regular order"
            found.append(NotRecognized(f"attention.{role}", layer.node, reason))
    if stream.output is None and stream.result is not None:
        reader = next(iter(stream.result.users), core)
        reason = "reads the joined heads and is no linear layer"
        found.append(NotRecognized("attention.output", reader, reason))
    return found


def _parts(flow: Flow, core: Core) -> dict[str, Any]:
    """Return the fields of an attention, its path among them."""
    joined = [getattr(core, role) for role in ROLES]
    streams, inside = _streams(flow, core, joined)
    results = [stream.result for stream in streams if stream.result] or [core.node]
    layers = [layer for stream in streams for layer in stream.layers]
    one = streams[0]
    several = [flow.origins[side].anchor for side in joined]
    x_q, x_k, x_v = (one.x_q, one.x_k, one.x_v) if len(streams) == 1 else several
    return {
        **flow.enclose(inside, *results),
        **_sizes(flow, core),
        "path": joint_path([layer.node for layer in layers] or [core.node]),
        "core": core.node,
        "streams": streams,
        "x_q": x_q,
        "x_k": x_k,
        "x_v": x_v,
        "masks": core.terms,
        "is_causal": core.causal,
        "source": _source(flow, streams),
        "rotary": one.rotary if len({s.rotary for s in streams}) == 1 else _agreed(streams),
    }


def _streams(
    flow: Flow, core: Core, joined: Sequence[fx.Node]
) -> tuple[tuple[Stream, ...], set[fx.Node]]:
    """Return the streams of an attention, and all nodes of its region."""
    sides = [sides_of(flow, value) for value in joined]
    if len({len(parts) for parts in sides}) > 1:  # as when keys and values alone are joined
        sides = [[Side(value, o := flow.origins[value], o)] for value in joined]
    inside = set(core.nodes)
    for value, parts in zip(joined, sides, strict=True):
        inside |= flow.between(value, flow.origins[value].anchor)
        for side in parts:
            if len(parts) > 1:
                inside.add(side.joined.anchor)
                inside |= flow.between(side.value, side.origin.anchor)
    counts = [_tokens(side) for side in sides[0]] if len(sides[0]) > 1 else [None]
    ways = exits_of(core, counts)
    streams = tuple(
        stream_of(flow, core, parts, way)
        for parts, way in zip(zip(*sides, strict=True), ways, strict=True)
    )
    for stream, way in zip(streams, ways, strict=True):
        inside |= way.nodes
        inside.update(n.node for n in (stream.query, stream.key, stream.value) if n)
    return streams, inside


def _tokens(side: Side) -> Any:
    """Return the number of tokens a side brings to the sequence."""
    return sizes(side.value)[arguments(side.joined.anchor).get("dim", 0)]


def _source(flow: Flow, streams: Sequence[Stream]) -> str:
    if len(streams) > 1:
        return "joint"
    (one,) = streams
    if one.x_k is not one.x_v:
        return "mixed"
    return "self" if is_reduced(flow, one.x_k, one.x_q) else "cross"


def _agreed(streams: Sequence[Stream]) -> Rotary:
    """Return the rotation of all streams, which may read parts of a table each."""
    found = {(s.rotary.kind, s.rotary.pairing, s.rotary.dims) for s in streams}
    if len(found) > 1:
        return Rotary("unknown")
    tables = dict.fromkeys(node for s in streams for node in s.rotary.tables)
    return Rotary(*found.pop(), tuple(tables))


def _sizes(flow: Flow, core: Core) -> dict[str, Any]:
    """Return heads, head widths and scale."""
    factors = [core.scale]
    for side in (core.query, core.key):
        parts = {part.origin.factor for part in sides_of(flow, side)}
        factors += [parts.pop() if len(parts) == 1 else None]
        if op(flow.origins[side].anchor) == "cat":
            factors.append(flow.origins[side].factor)
    known = [factor for factor in factors if factor is not None]
    return {
        "heads": _heads(flow, core, "query"),
        "kv_heads": _heads(flow, core, "key"),
        "head_dim": core.width("query"),
        "value_dim": core.width("value"),
        "scale": math.prod(known) if len(known) == len(factors) else None,
        "softcap": core.softcap,
    }


def _heads(flow: Flow, core: Core, role: str) -> int | None:
    """Count the heads, each once: by the features of the projection, else on their axis."""
    side: fx.Node = getattr(core, role)
    origin, width, axes = flow.origins[side], core.width(role), shape(side)
    rows = origin.features.rows if origin.features else None
    if rows is not None and width and rows.count % width == 0:
        return rows.count // width
    order = core.orders[ROLES.index(role)] if core.orders else tuple(range(len(axes)))
    if len(axes) < 4 or not isinstance(axes[order[-3]], int):
        return None
    heads = int(axes[order[-3]])
    return heads // origin.copies if heads % origin.copies == 0 else None
