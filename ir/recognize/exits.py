"""The way of attended values from the core of an attention to the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import LAYOUT, SPLITS, arguments, is_layer, op, readers, shape
from .core import Core
from .features import sizes
from .layer import Layer

_UNCUT = LAYOUT - SPLITS - {"slice", "narrow"}


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
        rejoined = _rejoined(node, users)
        if rejoined is not None:
            way += users
            node = rejoined
        elif len(users) == 1 and op(users[0]) in through:
            (node,) = users
        else:
            return node, way, users
        way.append(node)


def _rejoined(node: fx.Node, users: Sequence[fx.Node]) -> fx.Node | None:
    """Return the `cat` that puts all slices of a value together again, in their order."""
    if len(users) < 2 or any(op(n) != "slice" or len(n.args) > 4 for n in users):
        return None  # not cut, or with steps
    following = {reader for user in users for reader in readers(user)}
    joined, rank = next(iter(following), node), len(shape(node))
    if len(following) != 1 or op(joined) != "cat" or list(joined.args[0]) != list(users):  # type: ignore[arg-type]
        return None
    axes = {arguments(n).get("dim", 0) % rank for n in (joined, *users)}
    stop = 0
    for _, start, size, _ in _pieces(users):
        if start != stop:
            return None
        stop += size
    return joined if len(axes) == 1 and stop == sizes(node)[axes.pop()] else None


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


def _pieces(users: Sequence[fx.Node]) -> list[tuple[fx.Node, Any, Any, list[fx.Node]]]:
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
