"""The core of an attention: from queries, keys and values to the attended values.

    softmax(cap(scale * q @ k.T) + mask) @ v

As one op, or spelled out: as matrix products of three or four axes or `einsum`; scaled by a product
or a quotient; masked by a sum, `masked_fill` or `where`; with scores capped by a tanh, with a sink
that takes its part of the probability; with casts around the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graphs import remembered
from .calls import arguments, calls_to, op, readers, shape
from .products import Order, sides_between
from .scores import Scores, Term, climb, forward

__all__ = ["Core", "Term", "cores_of"]


@dataclass(frozen=True)
class Core:
    """`softmax(scores) @ v` with its scores.

    Attributes:
        node: The attended values.
        query: Queries; the last axis runs over a head, but for `orders`.
        key: Keys.
        value: Values.
        terms: What masks the scores, outermost first.
        causal: Whether queries attend to no later key, by a flag of the op.
        scale: Number scores are multiplied by; None when it is no number.
        softcap: c, where scores are `c * tanh(scores / c)` before they are masked; else None.
        sinks: Scores beside those of the keys that belong to no value, or None.
        nodes: Everything from the first product to the last.
        orders: Axes of query, key, value and result in the order (..., seq, head_dim).
        gap: Why this is no `scaled_dot_product_attention`; empty when it is, or could be one.
        spelled: Whether it is several nodes.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    terms: tuple[Term, ...] = ()
    causal: bool = False
    scale: float | None = 1.0
    softcap: float | None = None
    sinks: fx.Node | None = None
    nodes: frozenset[fx.Node] = frozenset()
    orders: tuple[Order, Order, Order, Order] | None = None
    gap: str = ""
    spelled: bool = False

    def width(self, role: str) -> int | None:
        """Return the width of one head of the `query`, `key` or `value`; None when dynamic."""
        side: fx.Node = getattr(self, role)
        roles = ("query", "key", "value")
        axis = self.orders[roles.index(role)][-1] if self.orders else -1
        width = shape(side)[axis]
        return width if isinstance(width, int) else None


def cores_of(graph: fx.Graph) -> list[Core]:
    """Return the cores of a graph in order, found once per graph."""
    return list(remembered(graph, Core, _find))


def _find(graph: fx.Graph) -> list[Core]:
    names = ("scaled_dot_product_attention", "softmax", "_softmax")
    found = (_spelled(n) if "softmax" in op(n) else _one_op(n) for n in calls_to(graph, names))
    return [core for core in found if core]


def _one_op(node: fx.Node) -> Core:
    given = arguments(node)
    mask, scale = given.get("attn_mask"), given.get("scale")
    width = shape(given["query"])[-1]
    if scale is None and isinstance(width, int):
        scale = 1 / math.sqrt(width)
    terms: tuple[Term, ...] = ()
    if mask is not None:
        terms = (Term(mask, "keep" if str(mask.meta["val"].dtype) == "torch.bool" else "add"),)
    return Core(
        node=node,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        terms=terms,
        causal=bool(given.get("is_causal")),
        scale=scale,
        nodes=frozenset({node}),
    )


def _spelled(softmax: fx.Node) -> Core | None:
    """Match from the softmax, both ways."""
    rank = len(shape(softmax))
    axis: Any = softmax.args[1]
    if axis % rank != rank - 1 or rank < 3:
        return None
    last, way, gap = forward(softmax)
    if last is None:
        return None
    scores = climb(softmax.args[0], Scores())
    if scores is None or scores.product is None:
        return None
    sides = sides_between(scores.product, last, way[-1])
    if sides is None:
        return None
    (query, key, value), orders = sides
    nodes = frozenset({*scores.nodes, softmax, *way, last})
    inner = nodes - {last}
    if scores.sinks is not None:
        gap = "gives part of the probability to a sink"
    if scores.cap is not None:
        gap = "caps its scores"
    if scores.scale is None:
        gap = "scales its scores by a value that is no number"
    gap = scores.gap or gap
    if any(not nodes.issuperset(readers(n)) for n in inner):
        gap = gap or "has scores or probabilities that are read elsewhere"
    return Core(
        node=last,
        query=query,
        key=key,
        value=value,
        terms=tuple(scores.terms),
        scale=scores.scale,
        softcap=scores.cap,
        sinks=scores.sinks,
        nodes=nodes,
        orders=orders,
        gap=gap,
        spelled=True,
    )
