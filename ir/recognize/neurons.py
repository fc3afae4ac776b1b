"""Hidden neurons: what a feed-forward network has between its two matrix products.

plain:  act(x @ up.T)                        gated:  act(x @ gate.T) * (x @ up.T)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from .activation import activation_of
from .calls import SPLITS, is_layer, op, peel, shape
from .convolution import Pointwise, is_depthwise, is_pointwise
from .flow import Flow
from .layer import Layer
from .path import layout_between
from .rows import Rows


@dataclass
class Hidden:
    """Hidden neurons: the value, how it is made, and the nodes that make it."""

    hidden: fx.Node
    activation: str
    up: Layer
    gate: Layer | None = None
    nodes: set[fx.Node] = field(default_factory=set)
    depthwise: list[fx.Node] = field(default_factory=list)


def hidden_of(flow: Flow, hidden: fx.Node) -> Hidden | None:
    """Match hidden neurons, or a depthwise convolution of them."""
    if not is_depthwise(hidden):
        return _gated(flow, hidden) or _glu(flow, hidden) or _plain(flow, hidden)
    source = hidden.args[0]
    assert isinstance(source, fx.Node)
    inner = peel(source)
    found = None if is_depthwise(inner) else hidden_of(flow, inner)
    if found is not None:
        found.nodes |= {hidden} | layout_between(source, inner)
        found.depthwise.append(hidden)
        found.hidden = hidden
    return found


def _plain(flow: Flow, hidden: fx.Node) -> Hidden | None:
    activation = activation_of(hidden)
    side = _side(flow, activation.source) if activation else None
    if activation is None or side is None:
        return None
    nodes = side.nodes | set(activation.nodes)
    return Hidden(hidden, activation.kind, side.layer, None, nodes, side.depthwise)


def _gated(flow: Flow, hidden: fx.Node) -> Hidden | None:
    """Match `act(gate) * up`, the activation of any kind or none."""
    operands = [n for n in hidden.args if isinstance(n, fx.Node)] if op(hidden) == "mul" else []
    if len(operands) != 2:
        return None
    for value, factor in (operands, operands[::-1], operands):
        activation = activation_of(peel(value))
        if activation is None and value is operands[1]:
            continue
        gate = _side(flow, activation.source if activation else value)
        up = _side(flow, factor)
        if gate is None or up is None or gate.layer.inputs[0] is not up.layer.inputs[0]:
            continue
        if (gate.layer.node, gate.layer.rows) == (up.layer.node, up.layer.rows):
            continue
        nodes = {hidden} | gate.nodes | up.nodes
        if activation:
            nodes |= activation.nodes | layout_between(value, activation.result)
        depthwise = list(dict.fromkeys((*gate.depthwise, *up.depthwise)))
        kind = activation.kind if activation else "none"
        return Hidden(hidden, kind, up.layer, gate.layer, nodes, depthwise)
    return None


def _glu(flow: Flow, hidden: fx.Node) -> Hidden | None:
    """Match `glu(y)`: the first half times the sigmoid of the second."""
    source = hidden.args[0] if op(hidden) == "glu" else None
    side = _side(flow, source) if isinstance(source, fx.Node) else None
    if side is None or side.layer.rows is None:
        return None
    layer, start, half = side.layer, side.layer.rows.start, side.layer.rows.count // 2
    up, gate = (replace(layer, rows=Rows.of(start + first, [(half, 1)])) for first in (0, half))
    return Hidden(hidden, "sigmoid", up, gate, {hidden} | side.nodes, side.depthwise)


@dataclass(frozen=True)
class _Side:
    """A layer that hidden neurons come from, and the nodes from it on."""

    layer: Layer
    nodes: set[fx.Node]
    depthwise: list[fx.Node]


def _side(flow: Flow, value: fx.Node) -> _Side | None:
    """Return the layer behind a value, through at most one depthwise convolution."""
    node = peel(value)
    if is_depthwise(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inner = _side(flow, source)
        if inner is None or inner.depthwise:
            return None
        layer = replace(inner.layer, rows=_channels(value, node) or inner.layer.rows)
        return _Side(layer, inner.nodes | {node} | layout_between(value, node), [node])
    if is_pointwise(node):
        layer = Pointwise.of_channels(node, _channels(value, node))
        return _Side(layer, {node} | layout_between(value, node), [])
    found = Layer.behind(flow, value)
    if found is None or not is_layer(node) or found.rows is None:
        return None
    return _Side(found, {node} | layout_between(value, node), [])


def _channels(value: fx.Node, source: fx.Node) -> Rows | None:
    """Return which channels of a convolution a value holds; None for all of them."""
    while value is not source:
        split: Any = value.args[0]
        if op(value) == "getitem" and op(split) in SPLITS:
            widths = [part.shape[1] for part in split.meta["val"]]
            index: Any = value.args[1]
            if sum(widths) == shape(split.args[0])[1]:
                return Rows.of(sum(widths[:index]), [(widths[index], 1)])
        value = split
    return None
