"""Things PyTorch has one op for, spelled out in several.

A model may write attention as two matrix products around a softmax, repeat key and value heads by
hand, or call `addmm` with a transposed weight. Finding them is the first half of canonicalizing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..graphs import aten
from ..regions import Region, local_path, unique_paths
from .activation import activation_of

_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransposedLinear(Region):
    """`addmm(bias, x, weight)` with a weight [in_features, out_features], views around it included.

    Attributes:
        weight_node: The `get_attr` node of the weight.
        bias_node: The one of the bias.
    """

    weight_node: fx.Node
    bias_node: fx.Node
    kind: ClassVar[str] = "transposed linear"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every `addmm` over parameters."""
        found = []
        for node in graph.nodes:
            if node.target is aten.addmm.default and not node.kwargs:
                arguments: Any = node.args
                bias, x, weight = arguments
                if bias.op == weight.op == "get_attr":
                    nodes, source = _with_views(node, x)
                    found.append((nodes, source, weight, bias))
        paths = unique_paths([local_path(nodes[-1]) for nodes, *_ in found])
        return [
            cls(
                path=path,
                nodes=nodes,
                inputs=(source,),
                outputs=nodes[-1:],
                weight_node=weight,
                bias_node=bias,
            )
            for path, (nodes, source, weight, bias) in zip(paths, found, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpelledActivation(Region):
    """An activation written as products and powers.

    Attributes:
        form: What it is: `silu`, `gelu` or `gelu_tanh`.
    """

    form: str
    kind: ClassVar[str] = "spelled activation"
    forms: ClassVar[frozenset[str]] = frozenset({"silu", "gelu", "gelu_tanh"})

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return activations that PyTorch has one op for."""
        order = {node: index for index, node in enumerate(graph.nodes)}
        found = [match for node in graph.nodes if (match := activation_of(node))]
        found = [m for m in found if len(m.nodes) > 1 and m.kind in cls.forms]
        found = [m for m in found if all(m.nodes.issuperset(n.users) for n in m.nodes - {m.result})]
        paths = unique_paths([local_path(match.result) for match in found])
        return [
            cls(
                path=path,
                nodes=tuple(sorted(match.nodes, key=order.__getitem__)),
                inputs=(match.source,),
                outputs=(match.result,),
                form=match.kind,
            )
            for path, match in zip(paths, found, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpelledAttention(Region):
    """`softmax(q @ k.T * scale + mask) @ v`, the inputs being q, k, v and the mask if any.

    Attributes:
        scale: Factor of the scores.
        masked: Whether a mask is added.
    """

    scale: float
    masked: bool
    kind: ClassVar[str] = "spelled attention"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return attentions over values of four axes, without dropout."""
        found = [parts for node in graph.nodes if (parts := _attention_parts(node))]
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatedHeads(Region):
    """Attention whose key and value heads are repeated by hand to match the query heads.

    The inputs are q, k and v before they were repeated, and the mask if any.

    Attributes:
        options: Keyword arguments of the attention op.
    """

    options: tuple[tuple[str, Any], ...]
    kind: ClassVar[str] = "repeated heads"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return attentions with `k` and `v` expanded over a new axis behind the heads."""
        found = [parts for node in graph.nodes if (parts := _repeated_parts(node))]
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


def _with_views(node: Any, x: Any) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """Return an `addmm` with the views that flatten and restore leading axes, and what it reads."""
    (user, *others) = node.users or (None,)
    if others or user is None or user.target not in _VIEWS or x.target not in _VIEWS:
        return (node,), x
    source = x.args[0]
    before, after = source.meta["val"], user.meta["val"]
    leading = [tuple(map(str, value.shape[:-1])) for value in (before, after)]
    same = leading[0] == leading[1] and before.shape[-1] == x.meta["val"].shape[-1]
    if not same or after.shape[-1] != node.meta["val"].shape[-1] or len(x.users) > 1:
        return (node,), x
    return (x, node, user), source


def _attention_parts(node: Any) -> dict[str, Any] | None:
    """Match from the softmax, both ways."""
    if node.target is not aten.softmax.int or node.args[1] not in (-1, 3):
        return None
    if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
        return None
    product = _only_user(node)
    if product is None or product.target is not aten.matmul.default or product.args[0] is not node:
        return None
    scores, mask, scale, inner = node.args[0], None, 1.0, []
    if _is(scores, aten.add.Tensor) and isinstance(scores.args[1], fx.Node) and not scores.kwargs:
        inner.append(scores)
        scores, mask = scores.args
    if _is(scores, aten.mul.Tensor, aten.div.Tensor) and isinstance(scores.args[1], int | float):
        inner.append(scores)
        factor = float(scores.args[1])
        scale = factor if scores.target is aten.mul.Tensor else 1 / factor
        scores = scores.args[0]
    if not _is(scores, aten.matmul.default):
        return None
    q, turned = scores.args
    if not _is(turned, aten.transpose.int) or {a % 4 for a in turned.args[1:]} != {2, 3}:
        return None
    v, k = product.args[1], turned.args[0]
    inner += [turned, scores]
    values = [n.meta["val"] for n in (q, k, v)]
    if any(value.dim() != 4 for value in values) or any(len(n.users) > 1 for n in inner):
        return None
    added = None if mask is None else mask.meta["val"]
    if added is not None and (added.dtype != values[0].dtype or added.dim() < 2):
        return None
    return {
        "nodes": (*reversed(inner), node, product),
        "inputs": (q, k, v) if mask is None else (q, k, v, mask),
        "outputs": (product,),
        "scale": scale,
        "masked": mask is not None,
    }


def _repeated_parts(node: Any) -> dict[str, Any] | None:
    if node.target is not aten.scaled_dot_product_attention.default or "enable_gqa" in node.kwargs:
        return None
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, node.args[3:], strict=False)) | node.kwargs
    mask = options.pop("attn_mask", None)
    q, k, v = node.args[:3]
    expanded = [_repeated(n) for n in (k, v)]
    if None in expanded or options.get("dropout_p"):
        return None
    (k_nodes, k0), (v_nodes, v0) = expanded  # type: ignore[misc]
    given = (q, k0, v0) if mask is None else (q, k0, v0, mask)
    return {
        "nodes": (*k_nodes, *v_nodes, node),
        "inputs": given,
        "outputs": (node,),
        "options": tuple(sorted(options.items())),
    }


def _repeated(node: Any) -> tuple[tuple[fx.Node, ...], fx.Node] | None:
    """Match `x[:, :, None].expand(..., times, ...).reshape(...)` over [batch, heads, seq, dim]."""
    if not _is(node, *_VIEWS) or not _is(node.args[0], aten.expand.default):
        return None
    expand = node.args[0]
    source, nodes = expand.args[0], [expand, node]
    while _is(source, aten.slice.Tensor, aten.unsqueeze.default):
        if source.target is aten.unsqueeze.default and source.args[1] not in (2, -3):
            return None  # a tile, which is another order of heads
        nodes.insert(0, source)
        source = source.args[0]
    old, wide, new = (n.meta["val"].shape for n in (source, expand, node))
    if len(old) != 4 or len(wide) != 5 or len(new) != 4 or any(len(n.users) > 1 for n in nodes):
        return None
    kept = [str(wide[axis]) for axis in (0, 1, 3, 4)] == list(map(str, old))
    merged = new[1] == old[1] * wide[2] and list(map(str, new[2:])) == list(map(str, old[2:]))
    return (tuple(nodes), source) if kept and merged else None


def _is(node: Any, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def weights_of(region: TransposedLinear) -> tuple[Tensor, Tensor]:
    """Return weight [in_features, out_features] and bias [out_features]."""
    return region.tensor(region.weight_node), region.tensor(region.bias_node)
