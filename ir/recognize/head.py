"""Heads: what reads the last stream and ends in the result.

logits = linear(norm(x))                    class = linear(pool(norm(x)))
noise = linear(norm(x) * (1 + scale) + shift)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ..program import Program
from ..regions import Region, unique_paths
from .calls import LAYOUT, is_layer, joint_path, op
from .flow import flow_of
from .layer import Layer
from .norm import Norm
from .surroundings import HEAD, Surroundings, as_region, surroundings_of

_POOLS = {"mean", "select", "index", "amax", "max", "gather"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Head(Region):
    """From the last stream to the result.

    Attributes:
        norms: Norms in it.
        layers: Linear layers that read the stream, in order.
        condition_layers: Linear layers whose results modulate it.
        is_modulated: Whether what a norm returns is multiplied by something made of a condition.
        pools: Whether it picks or averages tokens: a classifier.
    """

    norms: tuple[Norm, ...]
    layers: tuple[Layer, ...]
    condition_layers: tuple[Layer, ...]
    is_modulated: bool
    pools: bool
    kind: ClassVar[str] = "head"

    @property
    def form(self) -> str:
        """`norm` alone, `pooled`, `modulated`, or `linear` over every token."""
        if self.is_modulated:
            return "modulated"
        if self.pools:
            return "pooled"
        return "linear" if self.layers else "norm"

    @property
    def is_tied(self) -> bool:
        """Whether a layer of it reads a weight that something else reads too."""
        weights = [layer.weight_node for layer in self.layers]
        return any(self.is_shared(weight) for weight in weights if weight is not None)

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        sizes = [[layer.in_features, layer.node.meta["val"].shape[-1]] for layer in self.layers]
        return {"form": self.form, "is_tied": self.is_tied, "layers": sizes}


def heads_of(program: Program) -> list[Head]:
    """Return the heads of a program, in the order of their first nodes."""
    around = surroundings_of(program)
    groups = [g for g in around.components(HEAD) if any(op(n) not in LAYOUT for n in g)]
    groups = [group for group in groups if not around.behind.isdisjoint(group)]
    paths = unique_paths([joint_path(filter(is_layer, group)) or "head" for group in groups])
    return [_head(program, around, nodes, path) for nodes, path in zip(groups, paths, strict=True)]


def _head(program: Program, around: Surroundings, nodes: list[fx.Node], path: str) -> Head:
    flow, inside = flow_of(program.main), set(nodes)
    layers = [Layer.of(n, Layer.all_features(n)) for n in nodes if is_layer(n)]
    bound = [layer.bind(program, "main", None) for layer in layers]
    norms = [n.bind(program, "main", None) for n in flow.norms if n.outputs[0] in inside]
    owned = {n for norm in norms for n in norm.nodes}
    results = {norm.outputs[0] for norm in norms}
    pooling = (n for n in nodes if _pools(n) and n in around.behind)
    scaling = (n for n in nodes if op(n) == "mul" and not results.isdisjoint(n.all_input_nodes))
    factors = {f for n in scaling for f in n.all_input_nodes if f not in around.behind}
    return Head(
        path=path,
        norms=tuple(norms),
        layers=tuple(layer for layer in bound if layer.node in around.behind),
        condition_layers=tuple(layer for layer in bound if layer.node not in around.behind),
        is_modulated=any(flow.reads[factor] for factor in factors),
        pools=any(node not in owned for node in pooling),
        program=program,
        **as_region(nodes),
    )


def _pools(node: fx.Node) -> bool:
    return op(node) in _POOLS or "pool" in op(node)
