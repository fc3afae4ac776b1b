"""The way from a sublayer's output back to the stream it read.

y = x + gate * norm_after(sublayer(modulate(norm_before(x))))           then perhaps norm_of_sum(y)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from .calls import CARRYING, op, readers
from .flow import Flow, NotRecognized
from .norm import Norm

LONGEST = 32  # nodes looked at on either side of a sublayer
JOINS = 3  # additions passed before the stream itself is met: parallel branches, biases


@dataclass(frozen=True)
class Residual:
    """How a sublayer hangs on its stream.

    Attributes:
        stream: The value it adds to.
        total: The addition.
        out: The stream after it: `total`, or the norm of it.
        nodes: Nodes on the way, sublayer not counted.
        norm_before: Norm between stream and sublayer.
        norm_after: Norm between sublayer and addition.
        norm_of_sum: Norm of the sum, when nothing else reads the sum.
        gate: Value the sublayer's output is multiplied by.
        joins: Whether other branches are added to the sublayer's output first.
    """

    stream: fx.Node
    total: fx.Node
    out: fx.Node
    nodes: frozenset[fx.Node]
    norm_before: Norm | None
    norm_after: Norm | None
    norm_of_sum: Norm | None
    gate: fx.Node | None
    joins: bool

    @property
    def norm_place(self) -> str:
        """`pre`, `post` (of the sum), `sandwich`, `branch` (after the sublayer only) or `none`."""
        if self.norm_of_sum:
            return "post"
        if self.norm_before:
            return "sandwich" if self.norm_after else "pre"
        return "branch" if self.norm_after else "none"


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
    if output not in flow.ways:
        flow.ways[output] = _follow(flow, kind, inputs, output)
    way: Residual | NotRecognized = flow.ways[output]
    return way


def _follow(
    flow: Flow, kind: str, inputs: tuple[fx.Node, ...], output: fx.Node
) -> Residual | NotRecognized:
    before = _behind(flow, inputs)
    nodes: set[fx.Node] = set()
    norm_after: Norm | None = None
    gate: fx.Node | None = None
    value, joins, foreign = output, 0, None
    for _ in range(LONGEST):
        norm = _only_norm(flow, value)
        if norm is not None:
            nodes.update(norm.nodes)
            value, norm_after = norm.outputs[0], norm
            continue
        following = readers(value)
        if len(following) != 1:
            break
        (user,) = following
        others = [n for n in user.all_input_nodes if n is not value]
        nodes.add(user)
        if op(user) == "add" and others:
            stream = _stream(others[0], before)
            if stream is not None:
                joined = joins > 0 or stream is not others[0]
                return _closed(flow, nodes, before, (stream, user), norm_after, gate, joined)
            joins, foreign = joins + 1, foreign or user
            if joins > JOINS:
                break
        elif op(user) == "mul" and others:
            if not _weighs(flow, norm_after, value, others[0]):
                gate = others[0]
        elif op(user) not in CARRYING | {"mul", "div"}:
            break
        value = user
    if foreign is not None:
        return NotRecognized(kind, foreign, "adds something else than the stream it reads")
    node = user if len(following) == 1 else value
    return NotRecognized(kind, node, "stands where the addition to the stream would be")


def _stream(other: fx.Node, before: Mapping[fx.Node, fx.Node | None]) -> fx.Node | None:
    """Return the stream if it is what a branch is added to, perhaps after a parallel branch."""
    if other in before:
        return other
    joined = other.all_input_nodes if op(other) == "add" else []
    return next((node for node in joined if node in before), None)


def _closed(
    flow: Flow,
    nodes: set[fx.Node],
    before: Mapping[fx.Node, fx.Node | None],
    ends: tuple[fx.Node, fx.Node],
    norm_after: Norm | None,
    gate: fx.Node | None,
    joins: bool,
) -> Residual:
    stream, total = ends
    norm_before, step = None, before[stream]
    while step is not None:
        nodes.add(step)
        if step in flow.norm_to:
            norm_before = flow.norm_to[step]
            nodes.update(norm_before.nodes)
        step = before[step]
    of_sum = _only_norm(flow, total) if norm_before is None else None
    nodes.update(of_sum.nodes if of_sum else ())
    out = of_sum.outputs[0] if of_sum else total
    found = frozenset(nodes)
    return Residual(stream, total, out, found, norm_before, norm_after, of_sum, gate, joins)


def _behind(flow: Flow, values: tuple[fx.Node, ...]) -> dict[fx.Node, fx.Node | None]:
    """Return what the values may be modulations of, each with the node that reads it."""
    found: dict[fx.Node, fx.Node | None] = dict.fromkeys(values)
    pending = list(values)
    for node in pending:  # grows while it is walked: nearest nodes first
        if len(found) > LONGEST:
            break
        norm = flow.norm_to.get(node)
        if norm is not None:
            sources = list(norm.inputs)
        elif op(node) in CARRYING:
            sources = node.all_input_nodes[:1]
        elif op(node) in ("mul", "add", "div", "addcmul", "cat"):
            sources = node.all_input_nodes
        else:
            continue
        for source in sources:
            if source not in found and source.op != "get_attr":
                found[source] = node
                pending.append(source)
    return found


def _weighs(flow: Flow, norm: Norm | None, value: fx.Node, factor: fx.Node) -> bool:
    """Whether a factor is the weight of the norm it follows, computed as in `1 + weight`."""
    follows = norm is not None and norm.outputs[0] is value and norm.weight_node is None
    return follows and not flow.reads[factor]


def _only_norm(flow: Flow, value: fx.Node) -> Norm | None:
    """Return the norm that is the only reader of a value."""
    norm = flow.norm_from.get(value)
    return norm if norm is not None and set(norm.nodes).issuperset(readers(value)) else None
