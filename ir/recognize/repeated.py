"""Key and value heads that are repeated by hand, for an attention op that can share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import aten
from ..regions import Region, local_path, unique_paths
from .calls import arguments, calls_any

_VIEWS = (aten.view.default, aten.reshape.default)


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


def _repeated_parts(node: Any) -> dict[str, Any] | None:
    if node.target is not aten.scaled_dot_product_attention.default or "enable_gqa" in node.kwargs:
        return None
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, node.args[3:], strict=False)) | node.kwargs
    mask = options.pop("attn_mask", None)
    q, k, v = node.args[:3]
    expanded = [repeated(n) for n in (k, v)]
    if None in expanded or options.get("dropout_p"):
        return None
    (k_nodes, k0), (v_nodes, v0) = expanded  # type: ignore[misc]
    heads, kv_heads = (n.meta["val"].shape[1] for n in (q, k0))
    if isinstance(heads, int) and heads % kv_heads:
        return None
    given = (q, k0, v0) if mask is None else (q, k0, v0, mask)
    return {
        "nodes": tuple(dict.fromkeys((*k_nodes, *v_nodes, node))),
        "inputs": given,
        "outputs": (node,),
        "options": tuple(sorted(options.items())),
    }


def repeated(node: Any) -> tuple[tuple[fx.Node, ...], fx.Node] | None:
    """Match heads of [batch, heads, seq, dim] that are repeated one by one.

    `x.repeat_interleave(times, 1)`, or `x[:, :, None].expand(..., times, ...).reshape(...)`.
    """
    if calls_any(node, aten.repeat_interleave.self_int) and len(node.users) == 1:
        given = arguments(node)
        heads = node.meta["val"].dim() == 4 and given.get("dim") in (1, -3)
        return ((node,), given["self"]) if heads and isinstance(given["repeats"], int) else None
    if not calls_any(node, *_VIEWS) or not calls_any(node.args[0], aten.expand.default):
        return None
    expand = node.args[0]
    source, nodes = expand.args[0], [expand, node]
    while calls_any(source, aten.slice.Tensor, aten.unsqueeze.default):
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
