"""Units along the axes of values: which positions belong to which head or neuron.

    query.weight [heads * head_dim, dim]     0 0 0 1 1 1 2 2 2 ... along axis 0
    query(x)     [batch, seq, 3 * 3]         0 0 0 1 1 1 2 2 2     along the last
    .view(...)   [batch, seq, 3, 3]          0 1 2                 along axis 2

Units are followed from the rows of the layers that make them to the columns of the layers that read
them. On the way views lay them out anew, elementwise ops meet weights of the same units (biases,
norms, kernels), and whatever mixes one with another ends the walk with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from .features import sizes

Labels = tuple[int, ...]
Axes = tuple[Labels | None, ...]
NONE = -1  # a position that belongs to no unit


class Mixed(Exception):
    """Why units cannot be told apart any more: completes "the region ..."."""


class Walk:
    """Units of the values in a region.

    Attributes:
        axes: Units per axis of every value seen, None for axes without; a tuple of these for a
            value that is cut in parts.
        rows: Units of the rows of weights that make them.
        weights: Units along an axis of a weight, by `get_attr` node and axis.
        sinks: What is read through columns that have units: the value, by the layer's weight.
    """

    def __init__(self, rows: Mapping[fx.Node, Labels]) -> None:
        self.axes: dict[fx.Node, Any] = {}
        self.rows = rows
        self.weights: dict[tuple[fx.Node, int], Labels] = {}
        self.sinks: dict[fx.Node, fx.Node] = {}

    def of(self, node: Any) -> Axes:
        """Return the units along each axis of a value."""
        known = self.axes.get(node)
        if isinstance(known, tuple) and known:
            return known
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return (None,) * value.dim() if isinstance(value, Tensor) else ()

    def claim(self, node: fx.Node, axis: int, labels: Labels) -> None:
        """Note that a weight has units along an axis.

        Raises:
            Mixed: It is no weight, or has other units there.
        """
        axis %= len(sizes(node))
        if node.op != "get_attr":
            raise Mixed(
                f"meets {node.name}, which is made outside of it and does not shrink with it"
            )
        if self.weights.setdefault((node, axis), labels) != labels:
            raise Mixed(f"reads {node.target} in two different ways")


def some_of(labels: Labels) -> Labels | None:
    """Return the units of positions; None if none has one."""
    return labels if any(unit != NONE for unit in labels) else None


def regrouped(axes: Axes, old: Sequence[Any], new: Sequence[Any]) -> Axes:
    """Return the units along the axes of a view.

    Raises:
        Mixed: An axis of units is merged with something else, or a position holds several.
    """
    if not any(axes):
        return (None,) * len(new)
    found: list[Labels | None] = []
    for group, widths in _groups(list(zip(axes, old, strict=True)), list(new)):
        if not any(labels for labels, _ in group):
            found[:0] = [None] * len(widths)
        else:
            found[:0] = _laid_out(group, widths)
    return tuple(found)


def _groups(
    ours: list[tuple[Labels | None, Any]], theirs: list[Any]
) -> Iterator[tuple[list[tuple[Labels | None, Any]], list[Any]]]:
    """Pair runs of axes that hold the same elements, from the last to the first."""
    while ours or theirs:
        group, widths = [ours.pop()] if ours else [], [theirs.pop()] if theirs else []
        have, want = (group[0][1] if group else 1), (widths[0] if widths else 1)
        while have != want:
            numbers = isinstance(have, int) and isinstance(want, int)
            if ours and (not numbers or have < want or not theirs):
                group.insert(0, ours.pop())
                have = have * group[0][1]
            if theirs and have != want and (not numbers or have > want):
                widths.insert(0, theirs.pop())
                want = want * widths[0]
            if have != want and not (ours or theirs):
                raise Mixed("is laid out in a way that is not followed")
        yield group, widths


def _laid_out(group: Sequence[tuple[Labels | None, Any]], widths: list[Any]) -> list[Labels | None]:
    """Return the units along the new axes of one group."""
    sizes_ = [size for _, size in group]
    if not all(isinstance(size, int) for size in (*sizes_, *widths)):
        raise Mixed("merges its units with an axis of unknown size")
    table = np.full(sizes_, NONE)
    for axis, (labels, size) in enumerate(group):
        if labels is not None:
            shape = [size if i == axis else 1 for i in range(len(group))]
            table = table + (np.asarray(labels) + 1).reshape(shape) * (table == NONE)
    if sum(labels is not None for labels, _ in group) > 1:
        raise Mixed("has units along two axes that become one")
    table = table.reshape(widths)
    for axis, width in enumerate(widths):
        along = np.moveaxis(table, axis, 0).reshape(width, -1)
        if (along == along[:, :1]).all():
            labels = some_of(tuple(along[:, 0].tolist()))
            return [labels if i == axis else None for i in range(len(widths))]
    raise Mixed("holds its units in no regular order")
