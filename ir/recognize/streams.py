"""The sequences of tokens that take part in an attention.

Usually there is one. In joint attention there are several: each has projections of its own, queries
and keys and values are joined along the sequence, and the attended values are cut apart again.

Source: Esser et al., 2024 (Stable Diffusion 3), arXiv:2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import fx

from ..program import Program
from ..regions import changed
from .calls import arguments, is_layer, op, peel, shape
from .core import Core
from .exits import Exit
from .flow import Flow
from .layer import Layer
from .norm import Norm
from .origin import Origin
from .rotary import Rotary

ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Stream:
    """One sequence of tokens that takes part in an attention.

    Attributes:
        x_q: What queries are made of: the projection's input, or the value itself without one.
        x_k: What keys are made of.
        x_v: What values are made of.
        query: Projection of the queries; None without one. It may be a share of a fused layer.
        key: Projection of the keys.
        value: Projection of the values.
        output: Projection of the joined heads; None without one. A share of the columns where one
            layer reads the heads and something else side by side.
        result: Result of the output projection; this stream's part of the joined heads where there
            is none, or it is a share of columns; None where nothing reads this part.
        query_norm: Norm of the queries, or None.
        key_norm: Norm of the keys, or None.
        rotary: How queries and keys are rotated, before or after they are joined.
    """

    x_q: fx.Node
    x_k: fx.Node
    x_v: fx.Node
    query: Layer | None
    key: Layer | None
    value: Layer | None
    output: Layer | None
    result: fx.Node | None
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: Rotary

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The projections there are: query, key, value, output."""
        found = (self.query, self.key, self.value, self.output)
        return tuple(layer for layer in found if layer is not None)

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        """Return the same stream looked at through an instance."""
        names = ("query", "key", "value", "output", "query_norm", "key_norm")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        bound = {name: part.bind(program, graph, instance) for name, part in parts.items()}
        return changed(self, **bound)


@dataclass(frozen=True)
class Side:
    """Queries, keys or values of one stream.

    Attributes:
        value: The value, before it is joined with those of other streams.
        origin: Where it comes from.
        joined: Where the joined value comes from that it is a part of; the same for one stream.
    """

    value: fx.Node
    origin: Origin
    joined: Origin

    @property
    def norm(self) -> Norm | None:
        """The norm of this part, or of all parts after they were joined."""
        return self.origin.norm or self.joined.norm

    def layer(self, width: int | None) -> Layer | None:
        """Return the projection, its share known when it is whole heads of this width."""
        anchor, features = self.origin.anchor, self.origin.features
        if not is_layer(anchor):
            return None
        rows = features.rows if features else None
        whole = rows and width and rows.count % width == 0
        return Layer.of(anchor, rows if whole else None)

    def rotary(self, flow: Flow, x: fx.Node) -> Rotary:
        """Return how it is rotated."""
        found = [_rotary(flow, origin, x) for origin in dict.fromkeys((self.origin, self.joined))]
        return next((one for one in found if one.kind != "none"), found[0])


def sides_of(flow: Flow, value: fx.Node) -> list[Side]:
    """Return the parts a query, key or value of the core is joined of along the sequence."""
    joined = flow.origins[value]
    parts = joined_tokens(flow, joined.anchor)
    if not parts:
        return [Side(value, joined, joined)]
    return [Side(part, flow.origins[part], joined) for part in parts]


def joined_tokens(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """Return the projected values a node joins along the sequence, in order; empty for others."""
    if op(node) != "cat" or not flow.is_projected(node):
        return []
    axis, parts = token_axis(flow, node), list(node.all_input_nodes)
    return parts if axis is not None and len(parts) == len(node.args[0]) else []  # type: ignore[arg-type]


def token_axis(flow: Flow, node: fx.Node) -> int | None:
    """Return the axis along which a `cat` joins tokens; None when it joins features or batches."""
    axis = arguments(node).get("dim", 0) % len(shape(node))
    for part in node.all_input_nodes:
        features = flow.origins[part].features
        if features is None or features.axes is None or features.axes[axis] is not None:
            return None
    return axis or None


def _rotary(flow: Flow, origin: Origin, x: fx.Node) -> Rotary:
    """Say how a value is rotated, by tables that do not come from x."""
    if not flow.is_projected(origin.anchor):
        return Rotary("unknown")
    turn = origin.mix.turn
    if turn is None:
        return Rotary("unknown" if origin.mixed else "none")
    apart = all(
        not flow.reads[node] & flow.reads[x] or (x in flow.learned and node not in flow.learned)
        for node in turn.tables
    )
    return turn if apart else Rotary("unknown")


def stream_of(flow: Flow, core: Core, sides: Sequence[Side], way: Exit) -> Stream:
    """Return a stream of its queries, keys and values, and its way out."""
    layers = [side.layer(core.width(role)) for side, role in zip(sides, ROLES, strict=True)]
    x_q, x_k, x_v = (
        peel(layer.inputs[0]) if layer else side.origin.anchor
        for layer, side in zip(layers, sides, strict=True)
    )
    query, key = sides[0].rotary(flow, x_q), sides[1].rotary(flow, x_k)
    alike = (query.kind, query.pairing, query.dims) == (key.kind, key.pairing, key.dims)
    return Stream(
        x_q=x_q,
        x_k=x_k,
        x_v=x_v,
        query=layers[0],
        key=layers[1],
        value=layers[2],
        output=way.output,
        result=way.result,
        query_norm=sides[0].norm,
        key_norm=sides[1].norm,
        rotary=query if alike else Rotary("unknown"),
    )
