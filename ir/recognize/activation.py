"""Activations: one op, or written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import op

_SINGLE = {
    "silu", "relu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "softplus", "mish",
    "relu6", "hardswish", "hardsigmoid", "hardtanh",
}  # fmt: skip
_LARGEST = 10  # nodes of the longest spelling


@dataclass(frozen=True)
class Activation:
    """An elementwise function of one value.

    Attributes:
        kind: Its name.
        source: What it is applied to.
        result: What comes out.
        nodes: The nodes that compute it.
    """

    kind: str
    source: fx.Node
    result: fx.Node
    nodes: frozenset[fx.Node]


def activation_of(result: fx.Node) -> Activation | None:
    """Return the activation that a node is the result of."""
    name = op(result)
    source = result.args[0] if result.args else None
    if isinstance(source, fx.Node):
        if name in _SINGLE:
            return Activation(name, source, result, frozenset({result}))
        if name == "gelu":
            tanh = "tanh" in (*result.args[1:], result.kwargs.get("approximate"))
            kind = "gelu_tanh" if tanh else "gelu"
            return Activation(kind, source, result, frozenset({result}))
    if name not in ("mul", "div", "pow", "square"):
        return None
    for kind, spell in _SPELLINGS.items():
        x = _leaf(result)
        match = _Match(x)
        if x is not None and spell(match, result):
            return Activation(kind, x, result, frozenset(match.nodes))
    return None


class _Match:
    """Checks that nodes spell a formula over one value, and collects them."""

    def __init__(self, x: fx.Node | None) -> None:
        self.x = x
        self.nodes: set[fx.Node] = set()

    def call(self, node: Any, name: str, *operands: Any) -> bool:
        """Whether `node` calls `name` on operands that match, sums and products in any order."""
        if not isinstance(node, fx.Node) or op(node) != name or node.kwargs:
            return False
        if len(node.args) < len(operands):
            return False
        self.nodes.add(node)
        orders = [operands, operands[::-1]] if name in ("add", "mul") else [operands]
        return any(
            all(self.fits(a, o) for a, o in zip(node.args, order, strict=False)) for order in orders
        )

    def fits(self, value: Any, operand: Any) -> bool:
        if operand is X:
            return value is self.x
        if isinstance(operand, tuple):
            return self.call(value, *operand)
        return isinstance(value, int | float) and math.isclose(value, operand, rel_tol=1e-5)


X = object()


def _spelled(*formulas: Any) -> Callable[[_Match, fx.Node], bool]:
    return lambda match, node: any(match.fits(node, formula) for formula in formulas)


_CUBE = ("add", X, ("mul", ("pow", X, 3.0), 0.044715))
_TANH = ("add", ("tanh", ("mul", _CUBE, math.sqrt(2 / math.pi))), 1.0)
_SQUARED = ("add", ("mul", ("mul", X, 0.044715), X), 1.0)
_FACTORED = ("add", ("tanh", ("mul", ("mul", X, math.sqrt(2 / math.pi)), _SQUARED)), 1.0)
_ERF = (
    ("add", ("erf", ("div", X, math.sqrt(2))), 1.0),
    ("add", ("erf", ("mul", X, math.sqrt(0.5))), 1.0),
)
_SPELLINGS = {
    "silu": _spelled(("mul", X, ("sigmoid", X))),
    "quick_gelu": _spelled(
        ("mul", X, ("sigmoid", ("mul", X, 1.702))),
        ("div", ("silu", ("mul", X, 1.702)), 1.702),
        ("mul", ("silu", ("mul", X, 1.702)), 1 / 1.702),
    ),
    "gelu_tanh": _spelled(
        ("mul", ("mul", X, 0.5), _TANH),
        ("mul", 0.5, ("mul", X, _TANH)),
        ("mul", ("mul", X, 0.5), _FACTORED),
    ),
    "gelu": _spelled(
        *(("mul", ("mul", X, 0.5), erf) for erf in _ERF),
        *(("mul", ("mul", X, erf), 0.5) for erf in _ERF),
    ),
    "relu2": _spelled(
        ("pow", ("relu", X), 2), ("square", ("relu", X)), ("mul", ("relu", X), ("relu", X))
    ),
}


def _leaf(result: fx.Node) -> fx.Node | None:
    """Return the one value that the formula ending in `result` is about."""
    inner = {"mul", "add", "div", "pow", "square", "tanh", "erf", "sigmoid", "relu", "silu"}
    seen, pending = {result}, [result]
    leaves: dict[fx.Node, None] = {}
    while pending and len(seen) <= _LARGEST:
        for source in pending.pop().all_input_nodes:
            if op(source) not in inner:
                leaves[source] = None
            elif source not in seen:
                seen.add(source)
                pending.append(source)
    return next(iter(leaves)) if len(leaves) == 1 else None
