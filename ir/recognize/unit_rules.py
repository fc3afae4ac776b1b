"""How units go through ops, one rule per kind of op.

Layers give units to their rows and take them from their columns; views lay them out anew;
elementwise ops and attention keep them apart; sums and norms over them end the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import fx

from .calls import arguments, op
from .features import sizes
from .units import NONE, Axes, Labels, Mixed, Walk, regrouped, some_of


def follow(walk: Walk, node: fx.Node) -> None:
    """Find out which units the result of a node has.

    Raises:
        Mixed: It cannot be said.
    """
    name = op(node)
    rule = _RULES.get(name)
    source: Any = node.args[0] if node.args else None
    if name == "getitem":
        walk.axes[node] = walk.axes.get(source, {}).get(node.args[1], ())
    elif rule is not None:
        walk.axes[node] = rule(walk, node, arguments(node))
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        walk.axes[node] = _pointwise(walk, node, node.all_input_nodes)
    elif any(any(walk.of(source)) for source in node.all_input_nodes):
        raise Mixed(f"is read by {name} in a way that is not followed; canonicalize may help")


Rule = Callable[[Walk, fx.Node, dict[str, Any]], Any]


def _same(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    return walk.of(node.args[0])


def _pointwise(walk: Walk, node: fx.Node, operands: Sequence[fx.Node], axes: int = 0) -> Axes:
    """Join the units of operands that are broadcast; the last `-axes` axes are left out."""
    found: list[Labels | None] = []
    for axis in range(-len(sizes(node)), axes):
        wide = [n for n in operands if len(sizes(n)) >= -axis and sizes(n)[axis] != 1]
        known = {walk.of(n)[axis] for n in wide} - {None}
        if len(known) > 1:
            raise Mixed(f"combines different units in {node.name}")
        labels = known.pop() if known else None
        if labels is not None:
            for other in (n for n in wide if walk.of(n)[axis] is None):
                walk.claim(other, axis, labels)
        found.append(labels)
    return tuple(found)


def _linear(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    *outer, inner = walk.of(x)
    rows = walk.rows.get(weight)
    if inner is not None:
        walk.claim(weight, 1, inner)
        walk.sinks[weight] = x
    for tensor in (weight, bias) if rows is not None else ():
        if tensor is not None:
            walk.claim(tensor, 0, rows)  # type: ignore[arg-type]
    return (*outer, rows)


def _convolution(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    axes, channel = walk.of(x), len(sizes(node)) - len(sizes(weight)) + 1
    if any(labels for axis, labels in enumerate(axes) if axis != channel):
        raise Mixed(f"is convolved over its units in {node.name}")
    inner, rows = axes[channel], walk.rows.get(weight)
    if given.get("groups", 1) > 1 and inner is not None:
        if sizes(weight)[0] != len(inner):
            raise Mixed(f"is convolved in groups in {node.name}")
        rows = inner
    elif inner is not None:
        walk.claim(weight, 1, inner)
        walk.sinks[weight] = x
    for tensor in (weight, bias) if rows is not None else ():
        if tensor is not None:
            walk.claim(tensor, 0, rows)  # type: ignore[arg-type]
    return tuple(rows if axis == channel else None for axis in range(len(axes)))


def _attention(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    query, key, value = (walk.of(given[name]) for name in ("query", "key", "value"))
    if any(axes[axis] for axes in (query, key, value) for axis in (-1, -2)):
        raise Mixed("does not keep its heads apart")
    if len(query) < 3:
        return query
    heads, kv_heads = sizes(given["query"])[-3], sizes(given["key"])[-3]
    labels, copies = query[-3], heads // kv_heads if heads != kv_heads else 1
    if key[-3] != value[-3]:
        raise Mixed("has keys and values of different heads")
    if key[-3] is not None or copies == 1:
        repeated = tuple(unit for unit in key[-3] or () for _ in range(copies))
        if (labels or ()) != repeated:
            raise Mixed("repeats its keys and values outside of the attention; canonicalize first")
    mask = given.get("attn_mask")
    if labels and mask is not None and len(sizes(mask)) > 2 and sizes(mask)[-3] != 1:
        if walk.of(mask)[-3] is None:
            walk.claim(mask, -3, labels)
    return (*query[:-1], None)


def _product(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    factors = node.all_input_nodes[:2]
    if any(labels for factor in factors for labels in walk.of(factor)[-2:]):
        raise Mixed(f"sums over its units in {node.name}")
    return (*_pointwise(walk, node, factors, -2), None, None)


def _normalised(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = walk.of(given["input"])
    over = len(given["normalized_shape"])
    if any(axes[len(axes) - over :]):
        raise Mixed(f"is normalised over all its units together in {node.name}")
    return axes


def _reduced(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = walk.of(node.args[0])
    over = given.get("dim")
    dims = [over] if isinstance(over, int) else over or range(len(axes))
    gone = {axis % len(axes) for axis in dims}
    if any(axes[axis] for axis in gone):
        raise Mixed(f"is summed over all its units together in {node.name}")
    if len(sizes(node)) == len(axes):
        return axes
    return tuple(labels for axis, labels in enumerate(axes) if axis not in gone)


def _reshaped(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    source: Any = node.args[0]
    return regrouped(walk.of(source), sizes(source), sizes(node))


def _permuted(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, places = walk.of(node.args[0]), given["dims"]
    return tuple(axes[place] for place in places)


def _swapped(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = list(walk.of(node.args[0]))
    one, two = (int(axis) for axis in node.args[1:] or (0, 1))  # type: ignore[arg-type]
    axes[one], axes[two] = axes[two], axes[one]
    return tuple(axes)


def _expanded(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes = walk.of(node.args[0])
    return (*(None,) * (len(sizes(node)) - len(axes)), *axes)


def _repeated(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    source: Any = node.args[0]
    axes, axis = walk.of(source), given.get("dim")
    if not any(axes):
        return axes
    if not isinstance(axis, int) or not isinstance(given["repeats"], int):
        raise Mixed(f"is repeated in {node.name}")
    return _with(
        axes, axis, lambda labels: tuple(u for u in labels for _ in range(given["repeats"]))
    )


def _sliced(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    part = slice(given.get("start"), given.get("end"), given.get("step", 1))
    if part.step != 1 and walk.of(node.args[0])[given.get("dim", 0)]:
        raise Mixed(f"is cut in steps in {node.name}")
    return _with(walk.of(node.args[0]), given.get("dim", 0), lambda labels: labels[part])


def _selected(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    axes, axis = list(walk.of(node.args[0])), given["dim"]
    if axes[axis]:
        raise Mixed(f"has units that are picked by number in {node.name}")
    del axes[axis]
    return tuple(axes)


def _parted(walk: Walk, node: fx.Node, given: dict[str, Any]) -> dict[int, Axes]:
    axes = walk.of(node.args[0])
    axis, values = given.get("dim", 0) % len(axes), node.meta["val"]
    if op(node) == "unbind":
        if axes[axis]:
            raise Mixed(f"has units that are picked by number in {node.name}")
        return dict.fromkeys(range(len(values)), (*axes[:axis], *axes[axis + 1 :]))
    found: dict[int, Axes] = {}
    start = 0
    for index, value in enumerate(values):
        part = slice(start, start := start + value.shape[axis] if axes[axis] else start)
        found[index] = _with(axes, axis, itemgetter(part))
    equal = len({part[axis] for part in found.values()}) == 1
    by_size = isinstance(given.get("split_size", given.get("split_sizes")), tuple | list)
    if axes[axis] and not equal and not by_size:
        raise Mixed(f"is cut in {len(values)} parts of different units in {node.name}")
    return found


def _joined(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    parts = [walk.of(part) for part in given["tensors"]]
    axis = given.get("dim", 0) % len(sizes(node))
    if op(node) == "stack":
        parts = [(*part[:axis], None, *part[axis:]) for part in parts]
    rest = {(*part[:axis], *part[axis + 1 :]) for part in parts}
    if len(rest) > 1:
        raise Mixed(f"is joined with something else in {node.name}")
    labels = None
    if any(part[axis] for part in parts):
        widths = [sizes(part)[axis] for part in given["tensors"]]
        filled = [p[axis] or (NONE,) * w for p, w in zip(parts, widths, strict=True)]
        labels = some_of(tuple(unit for part in filled for unit in part))
    return (*parts[0][:axis], labels, *parts[0][axis + 1 :])


def _as_complex(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    if (axes := walk.of(node.args[0]))[-1]:
        raise Mixed(f"is paired up in {node.name}")
    return axes[:-1]


def _as_real(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    return (*walk.of(node.args[0]), None)


def _with(axes: Axes, axis: int, change: Callable[[Labels], Labels]) -> Axes:
    """Return axes with the labels of one changed, where it has any."""
    found, axis = list(axes), axis % len(axes)
    labels = axes[axis]
    found[axis] = None if labels is None else some_of(change(labels))
    return tuple(found)


_COPIES = ("contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "dropout")
_VIEWS = (
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten",
    "unsqueeze", "squeeze",
)  # fmt: skip
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys(_VIEWS, _reshaped),
    **dict.fromkeys(("transpose", "swapaxes", "t"), _swapped),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("softmax", "_softmax", "mean", "sum", "amax"), _reduced),
    **dict.fromkeys(("matmul", "bmm"), _product),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _parted),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "permute": _permuted,
    "expand": _expanded,
    "repeat_interleave": _repeated,
    "slice": _sliced,
    "select": _selected,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
}
