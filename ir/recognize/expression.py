"""Values as expressions over sizes, constants and inputs, computed for the shapes in the graph.

What a block reads of another, or of the main graph, is followed across their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..branches import is_cond
from ..graphs import is_mutable
from ..program import Program
from ..shapes import concrete
from .calls import LAYERS, op, shape

_LARGEST = 2**23  # entries of the largest value that is computed
_LONGEST = 600  # nodes of the longest expression
_SHAPES_ONLY = {
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like",
    "empty_like",
}  # fmt: skip
_HEAVY = LAYERS | {"matmul", "bmm", "mm", "addmm", "einsum", "scaled_dot_product_attention"}
_THIN = {"to", "_to_copy", "contiguous", "clone", "alias", "detach", "slice", "expand"}

Place = tuple[str | None, fx.Node]  # block instance, and a node of its graph


def origin_of(program: Program, place: Place) -> Place:
    """Return the expression a value is, views of the same shape aside, across calls of blocks."""
    instance, node = place
    while True:
        if op(node) in _THIN and _alike(node, node.args[0]):
            node = node.args[0]  # type: ignore[assignment]
        elif given := _given(program, (instance, node)):
            instance, node = given
        else:
            return instance, node


def _alike(node: fx.Node, source: Any) -> bool:
    """Whether a copy or view has the shape and type of what it is taken of."""
    if not isinstance(source, fx.Node) or node.meta["val"].dtype != source.meta["val"].dtype:
        return False
    return list(map(str, shape(node))) == list(map(str, shape(source)))


def _given(program: Program, place: Place) -> Place | None:
    """Return what a placeholder is given; None for an input of the program, and other nodes."""
    return program.given(*place) if place[1].op == "placeholder" else None


@dataclass(frozen=True)
class Expression:
    """What a mask is computed of.

    Attributes:
        places: The nodes, in an order in which they can be computed.
        inputs: Inputs of the program whose values, not just shapes, it depends on.
        parameters: Whether it depends on parameters.
        largest: The largest integer that something in it is compared with or shifted by.
        dynamic: Whether it has dynamic sizes.
    """

    places: tuple[Place, ...]
    inputs: frozenset[fx.Node]
    parameters: bool
    largest: int
    dynamic: bool


def expression_of(program: Program, root: Place) -> Expression | None:
    """Collect the expression a mask is; None when it is too long or no mere mask."""
    places = _in_order(program, root)
    if places is None:
        return None
    reads: dict[Place, frozenset[fx.Node]] = {}
    for place in places:
        node = place[1]
        if node.op == "get_attr" or (node.op == "placeholder" and not _given(program, place)):
            reads[place] = frozenset({node})
        elif op(node).startswith("sym_") or op(node) in _SHAPES_ONLY:
            reads[place] = frozenset()
        else:
            reads[place] = frozenset().union(*(reads[s] for s in _sources(program, place)))
    weights = [place for place in places if place[1].op == "get_attr"]
    learned = {p[1] for p in weights if _tensor_name(program, p) in program.parameters}
    return Expression(
        tuple(places),
        frozenset(node for node in reads[root] if node.op == "placeholder"),
        not learned.isdisjoint(reads[root]),
        max((n for _, node in places for n in _integers(node)), default=0),
        any(not isinstance(size, int) for _, node in places for size in shape(node)),
    )


def _in_order(program: Program, root: Place) -> list[Place] | None:
    """Return what a value is computed of, sources first; None when that is too much."""
    ordered: dict[Place, None] = {}
    pending, opened = [root], set[Place]()
    while pending:
        place = pending[-1]
        if place in ordered or place in opened:
            ordered[pending.pop()] = None
            continue
        opened.add(place)
        if len(opened) > _LONGEST or not _computable(place[1]):
            return None
        pending += [source for source in _sources(program, place) if source not in ordered]
    return list(ordered)


def _sources(program: Program, place: Place) -> list[Place]:
    """Return what a node reads, across calls of blocks."""
    instance, node = place
    if node.op == "placeholder":
        given = _given(program, place)
        return [given] if given else []
    return [(instance, source) for source in node.all_input_nodes]


def _computable(node: fx.Node) -> bool:
    if node.op == "call_module" or op(node) in _HEAVY or is_mutable(node) or is_cond(node):
        return False
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _tensor_name(program: Program, place: Place) -> str:
    instance, node = place
    slot = str(node.target)
    return program.instances[instance].weights[slot] if instance else slot


def _integers(node: fx.Node) -> Iterator[int]:
    """Yield the integers a node compares or adds."""
    if op(node) in ("add", "sub", "le", "lt", "ge", "gt", "eq", "tril", "triu", "rsub"):
        yield from (abs(a) for a in (*node.args, *node.kwargs.values()) if type(a) is int)


Fill = Callable[[fx.Node, tuple[int, ...]], Tensor]


def compute(program: Program, expression: Expression, fill: Fill) -> Tensor | None:
    """Compute an expression; None when a value of it is too large, or there are no weights."""
    size = concrete(program, None)
    env: dict[Place, Any] = {}
    with torch.no_grad():
        for place in expression.places:
            instance, node = place
            axes = tuple(size(s) for s in shape(node))
            if torch.Size(axes).numel() > _LARGEST:
                return None
            given = _given(program, place)
            if given is not None:
                env[place] = env[given]
            elif node.op == "placeholder":
                env[place] = fill(node, axes)
            elif node.op == "get_attr":
                env[place] = program.weight(str(node.target), instance)
            else:
                env[place] = _call(node, {n: env[instance, n] for n in node.all_input_nodes})
    result = env[expression.places[-1]]
    return result if isinstance(result, Tensor) and not result.is_meta else None


def _call(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, known.__getitem__)
    kwargs: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, known.__getitem__))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert callable(node.target)
    return node.target(*args, **kwargs)
