"""Which output features of a layer a value holds, however they are split and reshaped.

A value's axis that runs over features has a size and a stride, like an axis of memory:

    qkv(x): [batch, seq, 3 * dim]          axes -, -, (3 * dim, 1)
    .unflatten(-1, (3, heads, head_dim))   axes -, -, (3, dim), (heads, head_dim), (head_dim, 1)
    .unbind(2)[1]                          axes -, -, (heads, head_dim), (head_dim, 1), from dim on
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, fx

Axis = tuple[int, int] | None

_SWAPS = {"transpose", "swapaxes"}
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten",
    "unsqueeze", "squeeze",
}  # fmt: skip
_SAME = {"contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "dropout"}


@dataclass(frozen=True)
class Features:
    """Features of a layer in a value.

    Attributes:
        span: Range (start, stop) of features; None when they are no such range.
        axes: Size and stride per axis of the value, None for axes that do not run over features;
            None altogether once parts of heads are picked and the layout is no longer followed.
    """

    span: tuple[int, int] | None
    axes: tuple[Axis, ...] | None

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Return what a layer's own output holds: all features, along its last axis."""
        width = int(node.meta["val"].shape[-1])
        rank = node.meta["val"].dim()
        return cls((0, width), (*[None] * (rank - 1), (width, 1)))

    @property
    def is_flat(self) -> bool:
        """Whether the features are a range and lie along the last axis, in the layer's order."""
        if self.axes is None or self.span is None:
            return False
        *rest, last = self.axes
        return not any(rest) and last == (self.span[1] - self.span[0], 1)

    def after(self, name: str, node: fx.Node) -> Self:
        """Return what the result of a layout op holds, given what its first argument holds."""
        source: Any = node.args[0]
        if self.axes is None or name in _SAME or not isinstance(node.meta.get("val"), Tensor):
            return self
        args: Any = node.args[1:]
        rank = len(self.axes)
        if name in _SWAPS:
            order = list(range(rank))
            one, two = (axis % rank for axis in args)
            order[one], order[two] = two, one
            return replace(self, axes=tuple(self.axes[i] for i in order))
        if name == "permute":
            return replace(self, axes=tuple(self.axes[i] for i in args[0]))
        if name in _RESHAPES:
            return replace(self, axes=_reshaped(self.axes, sizes(source), sizes(node)))
        if name == "expand":
            return replace(self, axes=(*[None] * (len(sizes(node)) - rank), *self.axes))
        if name == "select" and isinstance(args[1], int):
            return self._picked(args[0] % rank, args[1], None)
        if name == "slice" and len(args) < 4:
            axis, first = (*args, 0)[0] % rank if args else 0, (*args, 0, 0)[1] or 0
            return self._picked(axis, first, sizes(node)[axis])
        if name == "getitem":
            return self._part(source, args[0])
        return replace(self, axes=None)

    def _part(self, split: fx.Node, index: int) -> Self:
        """Return what one part of a split holds."""
        assert self.axes is not None
        arguments: Any = split.args
        unbinds = str(split.target).startswith("aten.unbind")
        given: Any = arguments[1:] if unbinds else arguments[2:]
        last: Any = split.kwargs.get("dim", 0)
        axis = (*given, last)[0] % len(self.axes)
        if unbinds:
            return self._picked(axis, index, None)
        widths = [part.shape[axis] for part in split.meta["val"]]
        if not all(isinstance(width, int) for width in widths):
            return replace(self, axes=None) if self.axes[axis] else self
        return self._picked(axis, sum(widths[:index]), widths[index])

    def _picked(self, axis: int, first: Any, size: Any) -> Self:
        """Return what `size` positions of an axis hold from `first` on; None drops the axis."""
        assert self.axes is not None
        before, held, after = self.axes[:axis], self.axes[axis], self.axes[axis + 1 :]
        kept: tuple[Axis, ...] = () if size is None else (None,)
        if held is None:
            return replace(self, axes=(*before, *kept, *after))
        inside_heads = held[1] == 1 and sum(a is not None for a in self.axes) > 1
        if inside_heads or self.span is None or not isinstance(first, int):
            return replace(self, axes=None)
        if size is not None:
            kept = ((int(size), held[1]),)
        axes = (*before, *kept, *after)
        start = self.span[0] + (first + held[0] * (first < 0)) * held[1]
        return replace(self, span=_span(start, axes), axes=axes)


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return a shape whose entries compare and multiply without guards."""
    shape = node.meta["val"].shape
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in shape)


def _span(start: int, axes: Sequence[Axis]) -> tuple[int, int] | None:
    """Return the range that axes run over if they leave nothing out."""
    width = 1
    for size, stride in sorted((axis for axis in axes if axis), key=lambda axis: axis[1]):
        if stride != width:
            return None
        width *= size
    return start, start + width


def _reshaped(
    axes: Sequence[Axis], old: Sequence[Any], new: Sequence[Any]
) -> tuple[Axis, ...] | None:
    """Regroup axes from the last to the first; None when features merge with something else."""
    result: list[Axis] = []
    ours, theirs = list(zip(axes, old, strict=True)), list(new)
    while ours and any(axis for axis, _ in ours):
        group, sizes_ = [ours.pop()], [theirs.pop()] if theirs else [1]
        while (have := math.prod(s for _, s in group)) != (want := math.prod(sizes_)):
            if not isinstance(have, int) or not isinstance(want, int):
                return None
            if have < want and ours:
                group.insert(0, ours.pop())
            elif have > want and theirs:
                sizes_.insert(0, theirs.pop())
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
