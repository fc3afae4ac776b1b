"""Parts of a fused layer: by `chunk`, by `split`, or by `unbind` of a view of its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..regions import Region, local_path, unique_paths
from .calls import arguments, calls_to, is_layer, op, shape

_VIEWS = ("view", "reshape", "unflatten", "_unsafe_view")


@dataclass(frozen=True, kw_only=True, eq=False)
class PartedLayer(Region):
    """`y.chunk(n, -1)`, `y.split(width, -1)`, or `y.view(..., n, heads, head_dim).unbind(-3)`.

    The input is y, the result of a linear layer.

    Attributes:
        widths: Features of each part, in order.
        inner: Sizes its features are laid out in, as (heads, head_dim); empty when along one axis.
        picks: Which parts are read.
    """

    widths: tuple[int, ...]
    inner: tuple[int, ...]
    picks: tuple[int, ...]
    kind: ClassVar[str] = "parted layer"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the layers whose results are parted in another way than by `split` into sizes."""
        nodes = calls_to(graph, ("chunk", "split", "unbind"))
        found = [parts for node in nodes if (parts := _parts(node))]
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


def _parts(node: Any) -> dict[str, Any] | None:
    """Return the fields of a parted layer; None where another value or another axis is parted."""
    given = arguments(node)
    value: fx.Node = node.args[0]
    axis = given.get("dim", 0) % len(shape(value))
    nodes: tuple[Any, ...] = (node,)
    inner = shape(value)[axis + 1 :]
    if op(node) == "unbind":
        source: Any = value.args[0] if op(value) in _VIEWS and len(value.users) == 1 else value
        if source is value or not _lays_out(source, value, axis):
            return None
        nodes, value = (value, node), source
    elif inner:
        return None
    picks = sorted((n for n in node.users if op(n) == "getitem"), key=lambda n: n.args[1])
    width = shape(value)[-1]
    if not is_layer(value) or not isinstance(width, int) or len(picks) < len(node.users):
        return None
    widths = tuple(
        width // len(node.meta["val"]) if inner else int(part.shape[-1])
        for part in node.meta["val"]
    )
    return {
        "nodes": (*nodes, *picks),
        "inputs": (value,),
        "outputs": tuple(picks),
        "widths": widths,
        "inner": tuple(map(int, inner)),
        "picks": tuple(pick.args[1] for pick in picks),
    }


def _lays_out(source: fx.Node, view: fx.Node, axis: int) -> bool:
    """Whether a view splits nothing but the last axis, with `axis` outermost of what it becomes."""
    sizes, width = shape(view)[axis:], shape(source)[-1]
    before = [list(map(str, s)) for s in (shape(source)[:-1], shape(view)[:axis])]
    return isinstance(width, int) and len(sizes) > 1 and before[0] == before[1]
