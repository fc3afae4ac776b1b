"""Values that are written piece by piece into an empty tensor.

y = empty_like(x); y[..., 0::2] = a; y[..., 1::2] = b       as stack([a, b], -1).flatten(-2)
y = empty_like(x); y[..., :n] = a; y[..., n:] = b           as cat([a, b], -1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import arguments, op, shape

_EMPTY = {"empty_like", "new_empty", "empty"}


@dataclass(frozen=True)
class Written:
    """A tensor whose pieces cover it.

    Attributes:
        pieces: What was written, by place.
        axis: Along which the pieces lie.
        step: 1 for pieces side by side; how many there are, when they take turns.
        nodes: The nodes that allocate and write, the pieces left out.
    """

    pieces: tuple[fx.Node, ...]
    axis: int
    step: int
    nodes: frozenset[fx.Node]


def written_of(node: fx.Node) -> Written | None:
    """Return the pieces of a tensor that the last write completes; None for any other node."""
    axis, rank = None, len(shape(node))
    found: list[tuple[int, int, fx.Node]] = []
    nodes: set[fx.Node] = set()
    target: Any = node
    while op(target) == "slice_scatter":
        given = arguments(target)
        source, start, step = given["src"], given.get("start") or 0, given.get("step", 1)
        here = given.get("dim", 0) % rank
        if axis not in (None, here) or not isinstance(start, int) or start < 0:
            return None
        axis = here
        nodes.add(target)
        if op(source) == "copy":
            nodes |= {source, source.args[0]}
            source = source.args[1]
        found.append((start, step, source))
        target = target.args[0]
    if axis is None or op(target) not in _EMPTY:
        return None
    pieces = sorted(found, key=lambda piece: piece[0])
    step = _step(pieces, [shape(piece[2])[axis] for piece in pieces], shape(node)[axis])
    if step is None:
        return None
    return Written(tuple(piece for *_, piece in pieces), axis, step, frozenset({*nodes, target}))


def _step(pieces: list[tuple[int, int, fx.Node]], widths: list[Any], whole: Any) -> int | None:
    """Return the step of pieces that leave nothing out and overlap nowhere."""
    if not all(isinstance(width, int) for width in (*widths, whole)) or sum(widths) != whole:
        return None
    starts, steps = [start for start, *_ in pieces], {step for _, step, _ in pieces}
    if steps == {1}:
        return 1 if starts == [sum(widths[:i]) for i in range(len(widths))] else None
    turns = steps == {len(pieces)} and starts == list(range(len(pieces))) and len(set(widths)) == 1
    return len(pieces) if turns else None
