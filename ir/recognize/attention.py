"""Attention: from the projections to the output projection.

q = x_q @ Wq.T    k = x_k @ Wk.T    v = x_v @ Wv.T    y = softmax(scale * q @ k.T + mask) @ v @ Wo.T
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..program import Program
from ..regions import Region, unique_paths
from .calls import LAYOUT, is_layer, joint_path, op, peel, readers, shape
from .flow import Flow, NotRecognized, flow_of
from .layer import Layer
from .norm import Norm


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention(Region):
    """Multi-head attention around one `scaled_dot_product_attention`.

    A constant that the graph does not settle is None.

    Attributes:
        core: The `scaled_dot_product_attention` node.
        x_q: What queries are made of: the projection's input, or the value itself without one.
        x_k: What keys are made of.
        x_v: What values are made of.
        query: Projection of the queries; None without one. It may be a share of a fused layer.
        key: Projection of the keys.
        value: Projection of the values.
        output: Projection of the joined heads; None without one.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a query and a key head.
        scale: Number each score is multiplied by, scalar factors on queries and keys included.
        mask: `none`, `causal`, or `input`: the value `mask_node`, whatever it masks.
        mask_node: The mask, or None.
        source: `self` when queries, keys and values are made of one value, `cross` when keys and
            values share another, `mixed` for anything else.
        query_norm: Norm of the queries, or None.
        key_norm: Norm of the keys, or None.
        rotary: Whether parts of queries and keys are multiplied and added with values that do not
            come from x, as rotary position embeddings do.
    """

    core: fx.Node
    x_q: fx.Node
    x_k: fx.Node
    x_v: fx.Node
    query: Layer | None
    key: Layer | None
    value: Layer | None
    output: Layer | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    scale: float | None
    mask: str
    mask_node: fx.Node | None
    source: str
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: bool | None
    kind: ClassVar[str] = "attention"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The projections there are: query, key, value, output."""
        found = (self.query, self.key, self.value, self.output)
        return tuple(layer for layer in found if layer is not None)

    @property
    def qk_norm(self) -> bool | None:
        """Whether queries and keys are normalised; None when their projections are unknown."""
        if self.query_norm is not None and self.key_norm is not None:
            return True
        return False if self.query is not None and self.key is not None else None

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        names = ("heads", "kv_heads", "head_dim", "scale", "mask", "source", "qk_norm", "rotary")
        return {name: getattr(self, name) for name in names}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        for name in ("query", "key", "value", "output", "query_norm", "key_norm"):
            part = getattr(self, name)
            bound.__dict__[name] = part and part.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return one region per `scaled_dot_product_attention`."""
        cores = [node for node in graph.nodes if op(node) == "scaled_dot_product_attention"]
        flow = flow_of(graph)
        found = [_parts(flow, core) for core in cores]
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    def misses(self) -> list[NotRecognized]:
        """Say which parts of the pattern are not there, each with the node in their place."""
        found = []
        for role in ("query", "key", "value"):
            if getattr(self, role) is None:
                node = getattr(self, f"x_{role[0]}")
                joins = "joins several projections" if op(node) == "cat" else "is no linear layer"
                found.append(NotRecognized(f"attention.{role}", node, joins))
            elif getattr(self, role).features is None:
                node = getattr(self, role).node
                reason = "holds its output features in no contiguous range"
                found.append(NotRecognized(f"attention.{role}", node, reason))
        if self.output is None:
            node, _ = _forward(self.core)
            reason = "reads the joined heads and is no linear layer"
            found.append(NotRecognized("attention.output", node, reason))
        return found


def _parts(flow: Flow, core: fx.Node) -> dict[str, Any]:
    """Return the fields of an attention, its path among them."""
    call = _call(core)
    sides = [call[role] for role in ("query", "key", "value")]
    origins = [flow.origins[side] for side in sides]
    layers = [_share(flow, side) for side in sides]
    last, way = _forward(core)
    output = Layer.of(last, Layer.all_features(last)) if is_layer(last) else None
    inside = {core, *way, last} if output else {core}
    for side, origin, layer in zip(sides, origins, layers, strict=True):
        inside |= flow.between(side, origin.anchor) | ({layer.node} if layer else set())
    x_q, x_k, x_v = (
        peel(layer.inputs[0]) if layer else origin.anchor
        for layer, origin in zip(layers, origins, strict=True)
    )
    mask = call.get("attn_mask")
    return {
        **flow.enclose(inside, last if output else core),
        **dict(zip(("query", "key", "value", "output"), (*layers, output), strict=True)),
        **_sizes(flow, call),
        "path": joint_path([n.node for n in (*layers, output) if n] or [core]),
        "core": core,
        "x_q": x_q,
        "x_k": x_k,
        "x_v": x_v,
        "mask": "causal" if call.get("is_causal") else "none" if mask is None else "input",
        "mask_node": mask,
        "source": "self" if x_q is x_k is x_v else "cross" if x_k is x_v else "mixed",
        "query_norm": origins[0].norm,
        "key_norm": origins[1].norm,
        "rotary": _agreed(_rotary(flow, sides[0], x_q), _rotary(flow, sides[1], x_k)),
    }


def _sizes(flow: Flow, call: dict[str, Any]) -> dict[str, Any]:
    """Return heads, head width and scale."""
    query, key = flow.origins[call["query"]], flow.origins[call["key"]]
    width = shape(call["query"])[-1]
    scale = call.get("scale")
    if scale is None and isinstance(width, int):
        scale = 1 / math.sqrt(width)
    factors = [scale, query.factor, key.factor]
    known = [factor for factor in factors if isinstance(factor, int | float)]
    return {
        "heads": _heads(flow, call["query"]),
        "kv_heads": _heads(flow, call["key"]),
        "head_dim": width if isinstance(width, int) else None,
        "scale": math.prod(known) if len(known) == len(factors) else None,
    }


def _heads(flow: Flow, side: fx.Node) -> int | None:
    """Count the heads on the axis before the sequence, each once."""
    axes, copies = shape(side), flow.origins[side].copies
    features = flow.origins[side].features
    if len(axes) == 3 and features is not None and features.is_flat:
        return 1
    if len(axes) < 4 or not isinstance(axes[-3], int) or axes[-3] % copies:
        return None
    return axes[-3] // copies


def _share(flow: Flow, side: fx.Node) -> Layer | None:
    """Return the projection behind queries, keys or values."""
    origin, heads = flow.origins[side], _heads(flow, side)
    if not is_layer(origin.anchor):
        return None
    span = origin.features.span if origin.features else None
    whole = span and heads and span[1] - span[0] == heads * shape(side)[-1]
    return Layer.of(origin.anchor, span if whole else None)


def _rotary(flow: Flow, side: fx.Node, x: fx.Node) -> bool | None:
    """Say whether a side is mixed with values that do not come from x; None if they may."""
    origin = flow.origins[side]
    if not flow.is_projected(origin.anchor):
        return None
    if not origin.foreign:
        return False
    apart = all(
        not flow.reads[node] & flow.reads[x] or (x in flow.learned and node not in flow.learned)
        for node in origin.foreign
    )
    return True if origin.rotated and apart else None


def _agreed(one: bool | None, other: bool | None) -> bool | None:
    return one if one is other else None


def _forward(core: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the node that computes something with the joined heads, and those on the way."""
    way: list[fx.Node] = []
    node = core
    while len(following := readers(node)) == 1:
        (node,) = following
        if op(node) not in LAYOUT:
            return node, way
        way.append(node)
    return node, way


def _call(core: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in core.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, core.args, strict=False)) | dict(core.kwargs)
