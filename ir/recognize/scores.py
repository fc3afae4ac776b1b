"""Scores: the way from a softmax back to the product of queries and keys, and on to the values.

Scaled by a product or a quotient; masked by a sum, `masked_fill` or `where`; with scores capped by
a tanh, with a sink that takes its part of the probability; with casts around the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from .calls import arguments, op, readers, shape

_CASTS = {"to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach"}
_VIEWS = {"view", "reshape", "_unsafe_view", "unflatten", "flatten", "unsqueeze", "squeeze"}
_LONGEST = 16  # nodes between softmax and either product


@dataclass(frozen=True)
class Term:
    """One thing that masks scores.

    Attributes:
        node: The mask.
        form: `add`; `keep` or `drop`, a condition for scores that stay or are set to `value`.
        value: What scores that are dropped are set to.
    """

    node: fx.Node
    form: str = "add"
    value: float = -math.inf


@dataclass
class Scores:
    """What stands between a softmax and the product of queries and keys."""

    terms: list[Term] = field(default_factory=list)
    scale: float | None = 1.0
    cap: float | None = None
    sinks: fx.Node | None = None
    gap: str = ""
    nodes: set[fx.Node] = field(default_factory=set)
    product: fx.Node | None = None

    def kept(self) -> Scores:
        return replace(self, terms=list(self.terms), nodes=set(self.nodes))

    def times(self, number: float | None) -> None:
        self.scale = None if self.scale is None or number is None else self.scale * number

    def mask(self, term: Term) -> None:
        if self.scale != 1.0:
            self.gap = self.gap or "scales its mask with the scores"
        self.terms.append(term)


def forward(softmax: fx.Node) -> tuple[fx.Node | None, list[fx.Node], str]:
    """Return the product of probabilities and values, the nodes before it, and what is amiss."""
    node, way, gap = softmax, [softmax], ""
    for _ in range(_LONGEST):
        products = [n for n in readers(node) if op(n) in ("matmul", "bmm", "einsum")]
        if products:
            return products[0], way, gap
        steps = [
            n for n in readers(node) if op(n) in _CASTS | _VIEWS | {"dropout", "slice", "expand"}
        ]
        if not steps:
            break
        node = steps[0]
        if op(node) == "dropout":
            gap = "drops probabilities at random"
        elif op(node) == "slice":
            gap = gap or "leaves probabilities out"
        elif op(node) in _VIEWS and not _keeps(node):
            break
        elif op(node) in _VIEWS:
            gap = gap or "lays its probabilities out anew"
        way.append(node)
    return None, way, gap


def climb(node: Any, found: Scores) -> Scores | None:
    """Follow scores back to their product; None when there is none."""
    for _ in range(_LONGEST):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        name = op(node)
        found.nodes.add(node)
        if name in ("matmul", "bmm", "baddbmm", "einsum"):
            return _multiplied(node, found)
        step = _STEPS.get(name)
        if step is None:
            return None
        following = step(node, found)
        if isinstance(following, Scores) or following is None:
            return following
        node = following
    return None


def _multiplied(node: fx.Node, found: Scores) -> Scores | None:
    """End at the first product; `baddbmm` adds a mask to it."""
    found.product = node
    if op(node) == "baddbmm":
        given = arguments(node)
        if given.get("beta", 1) not in (0, 1):
            return None
        if given.get("beta", 1) == 1:
            found.mask(Term(given["self"]))
        found.times(given.get("alpha", 1))
    return found


def _cast(node: fx.Node, found: Scores) -> Any:
    return node.args[0]


def _view(node: fx.Node, found: Scores) -> Any:
    if not _keeps(node):
        return None
    found.gap = found.gap or "lays its scores out anew"
    return node.args[0]


def _scaled(node: fx.Node, found: Scores) -> Any:
    """Pass a product or quotient with a number: a scale, or the outer half of a cap."""
    if node.kwargs:  # a quotient that is rounded
        return None
    left, right = node.args[:2]
    if isinstance(left, int | float) and op(node) == "mul":
        left, right = right, left
    if not isinstance(right, int | float):
        return _learned(node, found)
    factor = float(right) if op(node) == "mul" else 1 / float(right)
    if isinstance(left, fx.Node) and op(left) == "tanh":
        inner: Any = left.args[0]
        found.nodes |= {left, inner}
        by = inner.args[1] if op(inner) in ("mul", "div") else None
        if not isinstance(by, int | float) or found.cap is not None or found.scale != 1.0 or not by:
            return None
        inside = by if op(inner) == "mul" else 1 / by
        if not math.isclose(inside * factor, 1.0, rel_tol=1e-6):
            return None
        found.cap = factor
        return inner.args[0]
    found.times(factor)
    return left


def _learned(node: fx.Node, found: Scores) -> Scores | None:
    """Pass a product with a value that is no number."""
    for side in node.all_input_nodes:
        other = climb(side, found.kept())
        if other is not None:
            other.scale = None
            return other
    return None


def _added(node: fx.Node, found: Scores) -> Scores | None:
    """Pass a sum: one operand leads to the product, the other is a mask."""
    if node.kwargs:
        return None
    for side, mask in (node.args[:2], node.args[1::-1]):
        if not isinstance(mask, fx.Node):
            return None
        kept = found.kept()
        kept.mask(Term(mask))
        other = climb(side, kept)
        if other is not None:
            return other
    return None


def _without_largest(node: fx.Node, found: Scores) -> Any:
    """Pass the subtraction of each row's largest score, which changes no probability."""
    scores, largest = node.args[:2]
    if isinstance(largest, fx.Node) and op(largest) == "getitem" and largest.args[1] == 0:
        found.nodes.add(largest)
        largest = largest.args[0]
    if isinstance(largest, fx.Node) and op(largest) in ("amax", "max") and not node.kwargs:
        found.nodes.add(largest)
        return scores if largest.args[0] is scores and _of_rows(largest) else None
    return None


def _of_rows(largest: fx.Node) -> bool:
    """Whether a maximum is one number for all keys of a query."""
    axes, rank = arguments(largest).get("dim", ()), len(shape(largest.args[0]))  # type: ignore[arg-type]
    axes = [axes] if isinstance(axes, int) else axes
    return not axes or rank - 1 in [axis % rank for axis in axes]


def choice_of(node: fx.Node) -> tuple[Any, Term] | None:
    """Return what a `where` or `masked_fill` keeps or sets to a number, and the condition."""
    options: list[tuple[Any, Any, str]] = []
    if op(node) == "masked_fill":
        scores, mask, fill = node.args[:3]
        options = [(scores, fill, "drop")]
    elif op(node) == "where" and len(node.args) == 3:
        mask, yes, no = node.args
        options = [(yes, no, "keep"), (no, yes, "drop")]
    for scores, fill, form in options:
        number = _number(fill)
        if number is not None and isinstance(mask, fx.Node):
            return scores, Term(mask, form, number)
    return None


def _chosen(node: fx.Node, found: Scores) -> Any:
    """Pass a choice between the scores and a number."""
    choice = choice_of(node)
    if choice is None:
        return None
    scores, term = choice
    found.mask(term)
    return scores


def _with_sink(node: fx.Node, found: Scores) -> Any:
    """Pass scores with one more column, as GPT-OSS has them."""
    parts: Any = node.args[0]
    if len(parts) != 2 or found.sinks is not None or found.terms:
        return None
    found.sinks = parts[1]
    return parts[0]


_STEPS: dict[str, Any] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_VIEWS, _view),
    "mul": _scaled,
    "div": _scaled,
    "add": _added,
    "sub": _without_largest,
    **dict.fromkeys(("masked_fill", "where"), _chosen),
    "cat": _with_sink,
}


def _number(value: Any) -> float | None:
    """Return a number, or the one that a constant tensor is full of."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and op(value) in ("full", "full_like", "scalar_tensor"):
        given = arguments(value)
        number = given.get("fill_value", given.get("s"))
        return float(number) if isinstance(number, int | float) else None
    return None


def _keeps(node: fx.Node) -> bool:
    """Whether a view leaves the last two axes as they are."""
    before: Any = node.args[0]
    return list(map(str, shape(before)[-2:])) == list(map(str, shape(node)[-2:]))
