"""The sequences of tokens that take part in an attention.

Usually there is one. In joint attention there are several: each has projections of its own, queries
and keys and values are joined along the sequence, and the attended values are cut apart again.

Source: Esser et al., 2024 (Stable Diffusion 3), arXiv:2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import fx

from ..program import Program
from ..regions import changed
from .calls import LAYOUT, SPLITS, arguments, is_layer, op, peel, readers, shape
from .core import Core
from .features import sizes
from .flow import Flow
from .layer import Layer
from .norm import Norm
from .origin import Origin
from .rotary import Rotary

ROLES = ("query", "key", "value")
_UNCUT = LAYOUT - SPLITS - {"slice", "narrow"}


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


@dataclass(frozen=True)
class Exit:
    """The way of attended values from the core to one stream.

    Attributes:
        output: Projection of the joined heads, if that is where it ends.
        result: Its result, or the joined heads; None when nothing reads them.
        nodes: The nodes on the way.
    """

    output: Layer | None
    result: fx.Node | None
    nodes: frozenset[fx.Node]


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


def exits_of(core: Core, counts: Sequence[Any]) -> list[Exit]:
    """Follow attended values to the layer that reads them, stream by stream.

    Args:
        core: Where they come from.
        counts: Tokens of every stream, in the order they were joined.
    """
    if len(counts) == 1:
        return [_exit(*_along(core.node, LAYOUT))]
    node, way, users = _along(core.node, _UNCUT)
    parts = _parts(users, counts)
    if parts is None:
        whole = Exit(None, node, frozenset(way))
        return [whole] * len(counts)
    exits = []
    for part, between in parts:
        if part is None:
            exits.append(Exit(None, None, frozenset()))
            continue
        last, further, following = _along(part, LAYOUT)
        exits.append(_exit(last, [*way, *between, *further], following))
    return exits


def _along(node: fx.Node, through: frozenset[str]) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """Return the last node that only lays a value out, the way to it, and who reads it."""
    way = [node]
    while True:
        users = readers(node)
        if len(users) != 1 or op(users[0]) not in through:
            return node, way, users
        (node,) = users
        way.append(node)


def _exit(node: fx.Node, way: list[fx.Node], users: list[fx.Node]) -> Exit:
    """Return where joined heads end: in a layer, in a share of one, or as they are."""
    if len(users) == 1:
        (user,) = users
        if is_layer(user) and user.args[0] is node:
            output = Layer.of(user, Layer.all_features(user))
            return Exit(output, user, frozenset((*way, user)))
        columns = _columns(user, node)
        if columns is not None:
            (layer,) = readers(user)
            return Exit(Layer.of(layer, Layer.all_features(layer), columns), node, frozenset(way))
    return Exit(None, node, frozenset(way))


def _columns(cat: fx.Node, value: fx.Node) -> tuple[int, int] | None:
    """Return which columns of a layer read a value that is joined with others for it."""
    following = readers(cat)
    if op(cat) != "cat" or len(following) != 1 or not is_layer(following[0]):
        return None
    rank, parts = len(shape(cat)), list(cat.all_input_nodes)
    if arguments(cat).get("dim", 0) % rank != rank - 1 or len(parts) != len(cat.args[0]):  # type: ignore[arg-type]
        return None
    widths = [shape(part)[-1] for part in parts]
    start = sum(int(width) for width in widths[: parts.index(value)])
    return start, start + int(shape(value)[-1])


Part = tuple[fx.Node | None, list[fx.Node]]


def _parts(users: list[fx.Node], counts: Sequence[Any]) -> list[Part] | None:
    """Match the pieces that attended values are cut into with the streams."""
    starts = [sum(counts[:index]) for index in range(len(counts))]
    found: list[Part] = [(None, [])] * len(counts)
    for piece, start, size, between in _pieces(users):
        if start not in starts or counts[starts.index(start)] != size:
            return None
        found[starts.index(start)] = (piece, between)
    return found


def _pieces(users: list[fx.Node]) -> list[tuple[fx.Node, Any, Any, list[fx.Node]]]:
    """Return what a value is cut into along the sequence: node, start, size, nodes between."""
    found: list[tuple[fx.Node, Any, Any, list[fx.Node]]] = []
    for user in users:
        given = arguments(user)
        axis = given.get("dim", 0)
        if op(user) == "slice":
            start = _expression(given.get("start") or 0)
            if isinstance(start, int) and start < 0:
                start = start + sizes(user.args[0])[axis]  # type: ignore[arg-type]
            found.append((user, start, sizes(user)[axis], []))
        elif op(user) in SPLITS:
            widths = [_expression(part.shape[axis]) for part in user.meta["val"]]
            for pick in readers(user):
                index: Any = pick.args[1]
                found.append((pick, sum(widths[:index]), widths[index], [user]))
        else:
            found.append((user, None, None, []))
    return found


def _expression(value: Any) -> Any:
    """Return a size as an expression that compares without guards."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return value if isinstance(value, int) else value.node.expr


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
