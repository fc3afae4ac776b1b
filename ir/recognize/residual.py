"""The way from a sublayer's output back to the stream it read.

y = x + gate * norm_after(sublayer(modulate(norm_before(x))))           then perhaps norm_of_sum(y)
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .attention import Attention, Stream
from .calls import CARRYING, is_layer, op, peel, readers, shape
from .entry import LONGEST, Before, Behind, entry_of, only_norm, weighs
from .flow import Flow, NotRecognized
from .norm import Norm

JOINS = 3  # additions passed before the stream itself is met: parallel branches, biases


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How a sublayer hangs on its stream.

    Attributes:
        stream: The value it adds to.
        total: The addition, or the subtraction; the sublayer's output where nothing passes by it.
        out: The stream after it: `total`, or the norm of it.
        nodes: Nodes on the way, sublayer not counted.
        sign: 1 where the sublayer is added, -1 where it is subtracted, 0 where its output takes
            the place of the stream.
        factor: Number its output is multiplied by; None when it is divided by a value.
        norm_before: Norm between stream and sublayer.
        norm_after: Norm between sublayer and addition.
        norm_of_sum: Norm of the sum, when nothing else reads the sum.
        scale: Value the sublayer's input is multiplied by after the norm.
        shift: Value that is added to the sublayer's input after the norm.
        gate: Value the sublayer's output is multiplied by.
        joins: Whether other branches are added to the sublayer's output first.
    """

    stream: fx.Node
    total: fx.Node
    out: fx.Node
    nodes: frozenset[fx.Node]
    sign: int = 1
    factor: float | None = 1.0
    norm_before: Norm | None = None
    norm_after: Norm | None = None
    norm_of_sum: Norm | None = None
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    gate: fx.Node | None = None
    joins: bool = False

    @property
    def norm_place(self) -> str:
        """`pre`, `post` (of the sum), `sandwich`, `branch` (after the sublayer only) or `none`."""
        if self.norm_of_sum:
            return "post"
        if self.norm_before:
            return "sandwich" if self.norm_after else "pre"
        return "branch" if self.norm_after else "none"


@dataclass
class _Way:
    """What was met between a sublayer and the addition."""

    value: fx.Node
    nodes: set[fx.Node] = field(default_factory=set)
    norm_after: Norm | None = None
    gate: fx.Node | None = None
    factor: float | None = 1.0
    joins: int = 0
    foreign: fx.Node | None = None


def residual_of(
    flow: Flow, kind: str, inputs: tuple[fx.Node, ...], output: fx.Node
) -> Residual | NotRecognized:
    """Follow a sublayer's output to the addition that brings it back to its stream.

    Args:
        flow: The graph.
        kind: What the sublayer is, for the record of a miss.
        inputs: Values the sublayer reads, any of which may come from the stream.
        output: Its result.
    """
    if (output, inputs) not in flow.ways:
        flow.ways[output, inputs] = _follow(flow, kind, Behind(flow, inputs), output)
    way: Residual | NotRecognized = flow.ways[output, inputs]
    return way


def ways_of(flow: Flow, attention: Attention) -> tuple[Residual | NotRecognized | None, ...]:
    """Return the way of each stream of an attention; None for one that ends there."""
    return tuple(
        residual_of(flow, "block", (stream.x_q,), end) if (end := _end(stream)) else None
        for stream in attention.streams
    )


def _end(stream: Stream) -> fx.Node | None:
    """Return what an attention gives to a stream, other shares of its output matrix included."""
    shares = stream.output is not None and stream.output.columns is not None
    return stream.output.node if shares and stream.output else stream.result


def straight_of(flow: Flow, x: fx.Node, y: fx.Node, left: Set[fx.Node]) -> Residual | None:
    """Return the way of a sublayer whose output takes the place of the stream.

    Args:
        flow: The graph.
        x: What the sublayer reads: all there is of a stream.
        y: What it returns, of the same shape.
        left: Streams as earlier sublayers left them.
    """
    before = Behind(flow, (x,))
    for stream in (node for node in before if node in left):
        nodes, norm, scale, shift = entry_of(flow, stream, before)
        inside = nodes | {n for n, step in before.items() if step in nodes}
        reading = [n for n in readers(stream) if n not in inside and n is not before[stream]]
        alone = before[stream] is not None and not reading
        if alone and shape(stream) == shape(y):
            way = Residual(
                stream=stream, total=y, out=y, nodes=frozenset(nodes), sign=0,
                norm_before=norm, scale=scale, shift=shift,
            )  # fmt: skip
            flow.ways[y, (x,)] = way
            return way
    return None


def _follow(flow: Flow, kind: str, before: Before, output: fx.Node) -> Residual | NotRecognized:
    way = _Way(output, _shared(output))
    following: list[fx.Node] = []
    for _ in range(LONGEST):
        norm = only_norm(flow, way.value)
        if norm is not None:
            way.nodes.update(norm.nodes)
            way.value, way.norm_after = norm.outputs[0], norm
            continue
        following = readers(way.value)
        if len(following) != 1:
            break
        found = _step(flow, way, before, following[0])
        if isinstance(found, Residual):
            return found
        if not found:
            break
    if way.foreign is not None:
        return NotRecognized(kind, way.foreign, "adds something else than the stream it reads")
    node = following[0] if len(following) == 1 else way.value
    return NotRecognized(kind, node, "stands where the addition to the stream would be")


def _shared(output: fx.Node) -> set[fx.Node]:
    """Return a matrix that several sublayers share, with what joins their results for it."""
    source: Any = output.args[0] if is_layer(output) else None
    if source is None or op(peel(source)) != "cat":
        return set()
    nodes = {output, peel(source)}
    while source not in nodes:
        nodes.add(source)
        source = source.args[0]
    return nodes


def _step(flow: Flow, way: _Way, before: Before, user: fx.Node) -> Residual | bool:
    """Follow one reader: the residual it closes, or whether the way goes on behind it."""
    name, others = op(user), [n for n in user.all_input_nodes if n is not way.value]
    way.nodes.add(user)
    if name in ("add", "sub", "addcmul") and others:
        stream = _stream(others[0], before)
        minus = name == "sub" and user.args[1] is way.value
        if name == "addcmul" and stream is not None and others[0] is user.args[0]:
            way.gate = (others[1:] or [None])[0]  # type: ignore[list-item]
        if stream is not None and (name != "sub" or minus):
            way.joins += stream is not others[0]
            return _closed(flow, way, before, (stream, user), -1 if minus else 1)
        way.joins, way.foreign = way.joins + 1, way.foreign or user
        if way.joins > JOINS or name != "add":
            return False
    elif name == "mul" and others:
        if not weighs(flow, way.norm_after, way.value, others[0]):
            way.gate = others[0]
    elif name in ("mul", "div"):
        way.factor = _times(way.factor, user, way.value)
    elif name not in CARRYING | {"add"}:
        return False
    way.value = user
    return True


def _times(factor: float | None, node: fx.Node, value: fx.Node) -> float | None:
    """Return a factor after a product with, or a quotient by, a number; None if it is no number."""
    number: Any = node.args[1] if node.args[0] is value else node.args[0]
    if factor is None or not isinstance(number, int | float) or number == 0:
        return None
    return factor * number if op(node) == "mul" else factor / number


def _stream(other: fx.Node, before: Before) -> fx.Node | None:
    """Return the stream if it is what a branch is added to, perhaps after a parallel branch."""
    if other in before:
        return other
    joined = other.all_input_nodes if op(other) == "add" else []
    return next((node for node in joined if node in before), None)


def _closed(
    flow: Flow,
    way: _Way,
    before: Before,
    ends: tuple[fx.Node, fx.Node],
    sign: int,
) -> Residual:
    stream, total = ends
    nodes, norm_before, scale, shift = entry_of(flow, stream, before)
    of_sum = only_norm(flow, total) if norm_before is None else None
    return Residual(
        stream=stream,
        total=total,
        out=of_sum.outputs[0] if of_sum else total,
        nodes=frozenset(way.nodes | nodes).union(of_sum.nodes if of_sum else ()),
        sign=sign,
        factor=way.factor,
        norm_before=norm_before,
        norm_after=way.norm_after,
        norm_of_sum=of_sum,
        scale=scale,
        shift=shift,
        gate=way.gate,
        joins=way.joins > 0,
    )
