"""Linear layers, alone and in groups that read one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..graphs import aten, common_prefix
from ..regions import Region, local_path, unique_paths


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Region):
    """`y = x @ weight.T + bias`, with weights that are parameters.

    Attributes:
        weight_node: The `get_attr` node of the weight, [out_features, in_features].
        bias_node: The one of the bias, [out_features], or None.
        is_router: Whether its results choose experts: the smallest change may choose others.
    """

    weight_node: fx.Node
    bias_node: fx.Node | None
    is_router: bool = False
    kind: ClassVar[str] = "linear"

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        return self.tensor(self.weight_node)

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return None if self.bias_node is None else self.tensor(self.bias_node)

    @property
    def weight_is_shared(self) -> bool:
        """Whether anything else of the model reads the same weight."""
        return self.is_shared(self.weight_node)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every `linear` whose weight and bias are parameters."""
        nodes = [node for node in graph.nodes if _is_linear(node)]
        paths = unique_paths([local_path(node) for node in nodes])
        return [
            cls(
                path=path,
                nodes=(node,),
                inputs=(node.args[0],),
                outputs=(node,),
                weight_node=node.args[1],
                bias_node=node.args[2] if len(node.args) > 2 else None,
                is_router=_is_router(node),
            )
            for node, path in zip(nodes, paths, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections(Region):
    """Two or more linear layers that read the same value: q, k and v; gate and up.

    Attributes:
        members: The layers, in execution order.
    """

    members: tuple[Linear, ...]
    kind: ClassVar[str] = "projections"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layers as this instance has them."""
        return tuple(m.bind(self.program, self.graph, self.instance) for m in self.members)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return groups of linear layers by the value they read, routers left out."""
        groups: dict[fx.Node, list[Linear]] = {}
        for linear in (layer for layer in Linear.find(graph) if not layer.is_router):
            groups.setdefault(linear.inputs[0], []).append(linear)
        found = [tuple(group) for group in groups.values() if len(group) > 1]
        paths = unique_paths([_joint_path(group) for group in found])
        return [
            cls(
                path=path,
                nodes=tuple(m.nodes[0] for m in group),
                inputs=group[0].inputs,
                outputs=tuple(m.nodes[0] for m in group),
                members=group,
            )
            for path, group in zip(paths, found, strict=True)
        ]


def _joint_path(group: tuple[Linear, ...]) -> str:
    """`attention.self.query`, `...key`, `...value` give `attention.self.query_key_value`."""
    paths = [linear.path for linear in group]
    prefix = common_prefix(paths)
    last = [path.removeprefix(prefix).strip(".").replace(".", "_") for path in paths]
    return ".".join(part for part in (prefix, "_".join(filter(None, last))) if part)


def _is_router(node: fx.Node) -> bool:
    """Whether the largest results are picked, or the largest of their softmax or sigmoid."""
    scores = {aten.softmax.int, aten.sigmoid.default}
    users = [user for u in node.users for user in (u.users if u.target in scores else (u,))]
    return any(user.target is aten.topk.default for user in users)


def _is_linear(node: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    weights: Any = node.args[1:]
    held = all(weight is None or weight.op == "get_attr" for weight in weights)
    return held and weights[0].meta["val"].dim() == 2
