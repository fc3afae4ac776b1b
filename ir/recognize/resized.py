"""Sizes that are written in calls, when some of the units of a region are left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import fx

from ..region_module import Call
from .calls import arguments, op, shape
from .units import Axes, Labels

Count = Callable[[Labels], int]
AxesOf = Mapping[fx.Node, Any]
Resize = Callable[[AxesOf, fx.Node, Count], Call]


def _viewed(axes_of: AxesOf, node: fx.Node, count: Count) -> Call:
    """Return a view to other sizes; what is no number is the size of an axis without units."""
    sizes: Any = arguments(node).get("sizes") or node.args[-1]
    axes: Axes = axes_of[node]
    first = len(axes) - len(sizes)
    if op(node) == "unflatten":
        first = int(node.args[1]) % (first + 1)  # type: ignore[arg-type]
    new = [
        size if labels is None or size == -1 else count(labels)
        for size, labels in zip(sizes, axes[first:], strict=False)
    ]
    return Call(node.target, (*node.args[:-1], new), node.kwargs)


def _split(axes_of: AxesOf, node: fx.Node, count: Count) -> Call:
    axis = arguments(node).get("dim", 0)
    parts = [part[axis] for part in axes_of[node].values()]
    sizes: Any = node.args[1]
    old = sizes if isinstance(sizes, tuple | list) else [sizes] * len(parts)
    new = [
        size if labels is None else count(labels) for size, labels in zip(old, parts, strict=True)
    ]
    given = new if isinstance(sizes, tuple | list) else new[0]
    return Call(node.target, (node.args[0], given, *node.args[2:]), node.kwargs)


def _slice(axes_of: AxesOf, node: fx.Node, count: Count) -> Call:
    given = arguments(node)
    source: Any = node.args[0]
    axes = axes_of.get(source)
    labels = axes[given.get("dim", 0)] if axes else None
    if labels is None:
        return Call(node.target, node.args, node.kwargs)
    bounds = range(len(labels))[given.get("start") : given.get("end")]
    start, stop = (count(labels[:place]) for place in (bounds.start, bounds.stop))
    return Call(node.target, (node.args[0], given.get("dim", 0), start, stop))


def _grouped(axes_of: AxesOf, node: fx.Node, count: Count) -> Call:
    """Return a depthwise convolution over fewer channels; others stay as they are."""
    given = arguments(node)
    channels = axes_of[node][len(shape(node)) - len(shape(given["weight"])) + 1]
    if given.get("groups", 1) > 1 and channels is not None:
        given = given | {"groups": count(channels)}
    x = given.pop("input")
    return Call(node.target, (x,), given)


_RESIZED: dict[str, Resize] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "expand"), _viewed),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _grouped),
    "slice": _slice,
}


def resized(
    nodes: Iterable[fx.Node], axes_of: AxesOf, kept: Collection[int]
) -> dict[fx.Node, Call]:
    """Return what is called instead of nodes in which sizes are written.

    Args:
        nodes: The nodes of a region.
        axes_of: Units along the axes of values.
        kept: Units that stay, and the number of those positions that belong to none.
    """

    def count(labels: Labels) -> int:
        return sum(unit in kept for unit in labels)

    return {
        node: resize(axes_of, node, count)
        for node in nodes
        if (resize := _RESIZED.get(op(node))) is not None
    }
