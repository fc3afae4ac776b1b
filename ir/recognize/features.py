"""Which output features of a layer a value holds, however they are split and reshaped.

A value's axis that runs over features has a size and a stride, like an axis of memory:

    qkv(x): [batch, seq, 3 * dim]          axes -, -, (3 * dim, 1)
    .unflatten(-1, (3, heads, head_dim))   axes -, -, (3, dim), (heads, head_dim), (head_dim, 1)
    .unbind(2)[1]                          axes -, -, (heads, head_dim), (head_dim, 1), from dim on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self, cast

from torch import Tensor, fx

from .calls import SPLITS, arguments, op
from .rows import Rows, united

Axis = tuple[int, int] | None
Axes = tuple[Axis, ...]

_SWAPS = {"transpose", "swapaxes"}
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten",
    "unsqueeze", "squeeze",
}  # fmt: skip
_SAME = {"contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "dropout"}


class Features(NamedTuple):
    """Features of a layer in a value.

    Attributes:
        rows: Which there are: rows of the layer's weight; None when they are no regular set.
        axes: Size and stride per axis of the value, None for axes that do not run over features;
            None altogether where the order of the features is not followed.
    """

    rows: Rows | None
    axes: Axes | None

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Return what a layer's own output holds: all features, along its last axis."""
        *outer, width = node.meta["val"].shape
        step = (int(width), 1)
        return cls(Rows.of(0, [step]), (*[None] * len(outer), step))

    @property
    def is_flat(self) -> bool:
        """Whether the features are a range and lie along the last axis, in the layer's order."""
        if self.axes is None or self.rows is None or self.rows.span is None:
            return False
        *rest, last = self.axes
        return not any(rest) and last == (self.rows.count, 1)

    def after(self, name: str, node: fx.Node) -> Features:
        """Return what the result of a layout op holds, given what its first argument holds."""
        if name in _SAME or name in SPLITS or not isinstance(node.meta.get("val"), Tensor):
            return self
        if self.axes is None:
            return self if name in _RESHAPES | _SWAPS | {"permute", "expand"} else _UNKNOWN
        lay_out = _LAYOUTS.get(name)
        return lay_out(self, self.axes, node) if lay_out else Features(self.rows, None)

    def _swapped(self, axes: Axes, node: fx.Node) -> Features:
        order, given = list(axes), cast(tuple[int, ...], node.args[1:])
        one, two = (axis % len(axes) for axis in given)
        order[one], order[two] = axes[two], axes[one]
        return Features(self.rows, tuple(order))

    def _permuted(self, axes: Axes, node: fx.Node) -> Features:
        places: Any = node.args[1]
        return Features(self.rows, tuple([axes[place] for place in places]))

    def _reshaped(self, axes: Axes, node: fx.Node) -> Features:
        source: Any = node.args[0]
        return Features(self.rows, _regrouped(axes, sizes(source), sizes(node)))

    def _complex(self, axes: Axes, node: fx.Node) -> Features:
        return Features(self.rows, axes[:-1] if axes[-1] else None)

    def _real(self, axes: Axes, node: fx.Node) -> Features:
        inner = min((held[1] for held in axes if held), default=0)
        return Features(self.rows, (*axes, (2, inner // 2)) if inner else None)

    def _expanded(self, axes: Axes, node: fx.Node) -> Features:
        return Features(self.rows, (*[None] * (len(sizes(node)) - len(axes)), *axes))

    def _selected(self, axes: Axes, node: fx.Node) -> Features:
        axis, index = cast(tuple[int, Any], node.args[1:])
        if not isinstance(index, int):
            return Features(self.rows, None)
        return self._picked(axis % len(axes), index, None)

    def _sliced(self, axes: Axes, node: fx.Node) -> Features:
        given = arguments(node)
        axis = given.get("dim", 0) % len(axes)
        return self._picked(axis, given.get("start") or 0, sizes(node)[axis], given.get("step", 1))

    def _part(self, axes: Axes, node: fx.Node) -> Features:
        """Return what one part of a split holds."""
        split, index = cast(tuple[fx.Node, int], node.args)
        axis = arguments(split).get("dim", 0) % len(axes)
        if op(split) == "unbind":
            return self._picked(axis, index, None)
        widths = [part.shape[axis] for part in split.meta["val"]]
        if not all(isinstance(width, int) for width in widths):
            return _UNKNOWN if axes[axis] else self
        return self._picked(axis, sum(widths[:index]), widths[index])

    def _picked(self, axis: int, first: Any, size: Any, step: int = 1) -> Features:
        """Return what `size` positions of an axis hold from `first` on; None drops the axis."""
        assert self.axes is not None
        before, held, after = self.axes[:axis], self.axes[axis], self.axes[axis + 1 :]
        if held is None:
            kept: Axes = () if size is None else (None,)
            return Features(self.rows, (*before, *kept, *after))
        if self.rows is None or not isinstance(first, int) or not isinstance(step, int):
            return _UNKNOWN
        if Rows.of(self.rows.start, filter(None, self.axes)) != self.rows:
            return _UNKNOWN  # each place holds several features
        axes = (*before, *(() if size is None else ((int(size), held[1] * step),)), *after)
        start = self.rows.start + (first + held[0] * (first < 0)) * held[1]
        return Features(Rows.of(start, filter(None, axes)), axes)

    @staticmethod
    def added(parts: Sequence[Features | None]) -> Features:
        """Return what the sum of parts of one layer holds: at each place, features of them all."""
        found = [part for part in parts if part is not None]
        rows = united(part.rows for part in found) if len(found) == len(parts) else None
        if rows is None:
            return _UNKNOWN
        layouts = {part.axes for part in found}
        return Features(rows, layouts.pop() if len(layouts) == 1 else None)

    @staticmethod
    def joined(parts: Sequence[Features | None], axis: int, form: str) -> Features:
        """Return what parts of one layer hold that are put together again, in whatever order.

        Args:
            parts: What each holds.
            axis: Where they are put together.
            form: `cat`, side by side; `stack`, on a new axis; `weave`, taking turns.
        """
        sums = Features.added(parts)
        layouts = [part.axes for part in parts if part]
        if sums.rows is None or None in layouts:
            return Features(sums.rows, None)
        found = [axes for axes in layouts if axes is not None]
        for axes in _together(found, axis, form):
            if Rows.of(sums.rows.start, filter(None, axes)) == sums.rows:
                return Features(sums.rows, axes)
        return Features(sums.rows, None)


_UNKNOWN = Features(None, None)
_LAYOUTS: dict[str, Callable[[Features, Axes, fx.Node], Features]] = {
    **dict.fromkeys(_SWAPS, Features._swapped),
    **dict.fromkeys(_RESHAPES, Features._reshaped),
    "permute": Features._permuted,
    "view_as_complex": Features._complex,
    "view_as_real": Features._real,
    "expand": Features._expanded,
    "select": Features._selected,
    "slice": Features._sliced,
    "getitem": Features._part,
}


def _together(layouts: Sequence[Axes], axis: int, form: str) -> Iterator[Axes]:
    """Yield the axes that values with these axes may have together."""
    first, count = layouts[0], len(layouts)
    if form == "stack":
        strides = [held[1] for held in first if held]
        inner = min(strides, default=1)
        spans = [held[0] * held[1] for held in first if held]
        for stride in (inner // count, *spans):  # pairs within, halves apart
            yield (*first[:axis], (count, stride), *first[axis:])
        return
    if any(axes[axis] is None for axes in layouts) or first[axis] is None:
        return
    sizes_, strides = zip(*(axes[axis] for axes in layouts), strict=True)
    for stride in (min(strides), min(strides) // count):
        yield (*first[:axis], (sum(sizes_), stride), *first[axis + 1 :])


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return a shape whose entries compare and multiply without guards."""
    shape = node.meta["val"].shape
    return tuple([s if type(s) is int else s.node.expr for s in shape])


def _regrouped(axes: Axes, old: Sequence[Any], new: Sequence[Any]) -> Axes | None:
    """Regroup axes from the last to the first; None when features merge with something else."""
    result: list[Axis] = []
    ours, theirs = list(zip(axes, old, strict=True)), list(new)
    while ours and any(axis for axis, _ in ours):
        group, sizes_ = [ours.pop()], [theirs.pop() if theirs else 1]
        have, want = group[0][1], sizes_[0]
        while have != want:
            if not isinstance(have, int) or not isinstance(want, int):
                return None
            if have < want and ours:
                group.insert(0, ours.pop())
                have *= group[0][1]
            elif have > want and theirs:
                sizes_.insert(0, theirs.pop())
                want *= sizes_[0]
            else:
                return None
        split = _split([a for a, size in group if size != 1], sizes_)
        if split is None:
            return None
        result[:0] = split
    return (*[None] * len(theirs), *result)


def _split(group: Sequence[Axis], new: Sequence[Any]) -> list[Axis] | None:
    """Lay the axes of a group out anew; None when only some of them run over features."""
    if not any(group):
        return [None] * len(new)
    held = [axis for axis in group if axis is not None]
    if len(held) != len(group):
        return None
    for (_, outer), (size, inner) in pairwise(held):
        if outer != size * inner:
            return None
    stride, result = held[-1][1], list[Axis]()
    for size in reversed(new):
        result.insert(0, (size, stride) if size != 1 else None)
        stride *= size
    return result
