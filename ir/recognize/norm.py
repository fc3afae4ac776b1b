"""Norms, as one op or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from ..graphs import aten
from ..regions import Region, local_path, unique_paths
from .calls import arguments, calls_any, calls_to

_OPS = {
    aten.layer_norm.default: ("layer_norm", ("input", "size", "weight", "bias", "eps")),
    aten.rms_norm.default: ("rms_norm", ("input", "size", "weight", "eps")),
    aten.group_norm.default: ("group_norm", ("input", "groups", "weight", "bias", "eps")),
}
_ROOTS = ("layer_norm", "rms_norm", "group_norm", "rsqrt", "sqrt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm(Region):
    """Layer norm, RMS norm or group norm.

    Attributes:
        form: `layer_norm`, `rms_norm` or `group_norm`.
        size: Elements normalised together in the last axes; channels of a group norm.
        groups: Groups of a group norm, else 1.
        eps: Added to the variance; None stands for the machine epsilon of the value's type.
        weight_node: The `get_attr` node of the scale, or None.
        bias_node: The one of the shift, or None.
        written_out: Whether several nodes spell it, as in `x * rsqrt(mean(x**2) + eps) * weight`.
    """

    form: str
    size: int
    groups: int = 1
    eps: float | None = None
    weight_node: fx.Node | None = None
    bias_node: fx.Node | None = None
    written_out: bool = False
    kind: ClassVar[str] = "norm"

    @property
    def weight(self) -> Tensor | None:
        """[size], or None."""
        return None if self.weight_node is None else self.tensor(self.weight_node)

    @property
    def bias(self) -> Tensor | None:
        """[size], or None."""
        return None if self.bias_node is None else self.tensor(self.bias_node)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every norm whose scale and shift, if any, are parameters."""
        found = []
        for node in calls_to(graph, _ROOTS):
            parts = _op_parts(node) or _written_out(node)
            if parts is not None:
                found.append(_centred(parts) or parts)
            elif (parts := _of_variance(node)) is not None:
                found.append(parts)
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


def _op_parts(node: Any) -> dict[str, Any] | None:
    """Return what a norm op says, as fields of a `Norm`."""
    if node.target not in _OPS:
        return None
    form, names = _OPS[node.target]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weights = [given.get("weight"), given.get("bias")]
    if any(weight is not None and weight.op != "get_attr" for weight in weights):
        return None
    value = given["input"]
    axes = given.get("size", [value.meta["val"].shape[1]])
    return {
        "form": form,
        "size": torch.Size(axes).numel(),
        "groups": given.get("groups", 1),
        "eps": given.get("eps", None if form == "rms_norm" else 1e-5),
        "weight_node": weights[0],
        "bias_node": weights[1],
        "nodes": (node,),
        "inputs": (value,),
        "outputs": (node,),
    }


def _written_out(node: Any) -> dict[str, Any] | None:
    """Match `x * rsqrt(mean(x * x) + eps)`, then perhaps a cast and a weight, from its root.

    An `x` that is itself `y - mean(y)` may be computed twice.
    """
    if node.target not in (aten.rsqrt.default, aten.sqrt.default) or len(node.users) != 1:
        return None
    added = _alone(node.args[0], aten.add.Tensor)
    mean = _alone(added and added.args[0], aten.mean.dim)
    square = _square(mean and mean.args[0])
    (last,) = node.users
    if not square or mean.args[1] != [-1] or not isinstance(added.args[1], int | float):
        return None
    if added.kwargs or mean.kwargs or not (len(mean.args) > 2 and mean.args[2]):
        return None  # a scaled sum, or a mean that lost its axis
    wide = square.args[0]
    x = wide.args[0] if wide.target is aten.to.dtype else wide
    scaled = aten.mul.Tensor if node.target is aten.rsqrt.default else aten.div.Tensor
    others = [n for n in last.all_input_nodes if n is not node]
    if last.target is not scaled or len(others) != 1:
        return None
    twins = [n for n in others if _alone(n, aten.sub.Tensor) and _repeats(n, wide)]
    if not twins and others[0] not in (wide, x):
        return None
    if scaled is aten.div.Tensor and last.args[1] is not node:
        return None
    owns_cast = wide is not x and {square, last}.issuperset(wide.users)
    first = (*((wide,) if owns_cast else ()), *twins, square, mean, added, node)
    parts = _scaled(first, last, x, x if owns_cast else wide, added.args[1])
    return _centred(parts) if twins else parts


def _of_variance(node: Any) -> dict[str, Any] | None:
    """Match `(x - mean(x)) / sqrt(var(x) + eps)`, the variance divided by all there are."""
    if node.target not in (aten.rsqrt.default, aten.sqrt.default) or len(node.users) != 1:
        return None
    added = _alone(node.args[0], aten.add.Tensor)
    variance = added and (
        _alone(added.args[0], aten.var.dim) or _alone(added.args[0], aten.var.correction)
    )
    if not variance or added.kwargs or not isinstance(added.args[1], int | float):
        return None
    given = arguments(variance)
    biased = given.get("unbiased") is False or given.get("correction") == 0
    (last,) = node.users
    scaled = aten.mul.Tensor if node.target is aten.rsqrt.default else aten.div.Tensor
    if not biased or given.get("dim") != [-1] or not given.get("keepdim"):
        return None
    if last.target is not scaled or (scaled is aten.div.Tensor and last.args[1] is not node):
        return None
    (centred,) = (n for n in last.args if n is not node) if len(set(last.args)) == 2 else (None,)
    if not isinstance(centred, fx.Node) or centred.args[:1] != (given["self"],):
        return None
    return _centred(_scaled((variance, added, node), last, centred, centred, added.args[1]))


def _scaled(
    first: tuple[fx.Node, ...], last: fx.Node, x: fx.Node, source: fx.Node, eps: float
) -> dict[str, Any]:
    """Return the fields of an RMS norm, the weight behind it included.

    Args:
        first: Its nodes up to the root.
        last: The product with the root, or the quotient.
        x: What is normalised, before it was cast.
        source: What the region reads.
        eps: Added to the variance.
    """
    tail = list(_tail(last))
    if tail and tail[-1].target is aten.to.dtype and not _same_type(tail[-1], x):
        tail.pop()
    width = int(x.meta["val"].shape[-1])
    weights = [n for follower in tail for n in follower.all_input_nodes if n.op == "get_attr"]
    if weights and tuple(weights[0].meta["val"].shape) != (width,):
        weights, tail = [], []
    return {
        "form": "rms_norm",
        "size": width,
        "eps": eps,
        "weight_node": weights[0] if weights else None,
        "nodes": (*first, last, *tail),
        "inputs": (source,),
        "outputs": ((last, *tail)[-1],),
        "written_out": True,
    }


def _centred(parts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the layer norm that an RMS norm of `x - mean(x)` is, and the shift added to it."""
    inside: set[fx.Node] = set(parts["nodes"])
    (centred,) = parts["inputs"]
    if not parts.get("written_out") or centred.target is not aten.sub.Tensor or centred.kwargs:
        return None
    x, mean = centred.args
    if not calls_any(mean, aten.mean.dim) or mean.args != (x, [-1], True):
        return None
    if not inside.issuperset({*centred.users, *mean.users} - {centred}):
        return None
    result = parts["outputs"][0]
    last = next(iter(result.users)) if len(result.users) == 1 else result
    others = [n for n in last.all_input_nodes if n is not result]
    shifts = last.target is aten.add.Tensor and not last.kwargs and len(others) == 1
    shifts = shifts and others[0].op == "get_attr"
    shifts = shifts and tuple(others[0].meta["val"].shape) == (parts["size"],)
    return parts | {
        "form": "layer_norm",
        "bias_node": others[0] if shifts else None,
        "nodes": (mean, centred, *parts["nodes"], *((last,) if shifts else ())),
        "inputs": (x,),
        "outputs": (last if shifts else result,),
    }


def _repeats(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node computes what another does, once more."""
    same = node.target is other.target and node.args == other.args and node.kwargs == other.kwargs
    return node is not other and same


def _alone(node: Any, target: object) -> Any:
    """Return a node if it calls `target` and has one reader."""
    return node if node and node.target is target and len(node.users) == 1 else None


def _square(node: Any) -> Any:
    power = _alone(node, aten.pow.Tensor_Scalar)
    product = _alone(node, aten.mul.Tensor)
    if (power and power.args[1] == 2) or (product and product.args[0] is product.args[1]):
        return node
    return _alone(node, aten.square.default)


def _tail(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the cast and the product with a weight that end a norm."""
    while len(node.users) == 1:
        (node,) = node.users
        weighs = node.target is aten.mul.Tensor and any(
            n.op == "get_attr" for n in node.all_input_nodes
        )
        if weighs or node.target is aten.to.dtype:
            yield node
        if node.target is not aten.to.dtype:
            return


def _same_type(node: fx.Node, other: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == other.meta["val"].dtype)
