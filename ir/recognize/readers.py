"""Linear layers by what they are for, those that read one value for one purpose together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import fx

from ..regions import Region, find_once, unique_paths
from .attention import Attention
from .calls import joint_path
from .experts import Experts
from .feed_forward import FeedForward
from .linear import Linear

INPUTS = "attention"
OUTPUT = "output"
OTHER = "other"


@dataclass(frozen=True, kw_only=True, eq=False)
class Readers(Region):
    """One or more linear layers of one role that read the same value.

    Attributes:
        role: `attention` for what makes queries, keys and values, `output` for what reads the
            joined heads, `other` for the rest. Routers and the layers of feed-forward networks and
            of experts are none of them.
        members: The layers, in execution order.
        before: For an `output`, the layers that make the queries, keys and values of its heads.
    """

    role: str
    members: tuple[Linear, ...]
    before: tuple[fx.Node, ...] = ()
    kind: ClassVar[str] = "readers"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layers as this instance has them."""
        return tuple(m.bind(self.program, self.graph, self.instance) for m in self.members)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return groups of linear layers by role and by the value they read."""
        roles, before = _roles(graph)
        networks = (*find_once(graph, FeedForward), *find_once(graph, Experts))
        inside = {node for region in networks for node in region.nodes}
        groups: dict[tuple[str, fx.Node], list[Linear]] = {}
        for linear in find_once(graph, Linear):
            node = linear.nodes[0]
            if node not in inside and not linear.is_router:
                groups.setdefault((roles.get(node, OTHER), linear.inputs[0]), []).append(linear)
        paths = unique_paths([joint_path(m.nodes[0] for m in group) for group in groups.values()])
        return [
            cls(
                path=path,
                nodes=tuple(m.nodes[0] for m in group),
                inputs=(value,),
                outputs=tuple(m.nodes[0] for m in group),
                role=role,
                members=tuple(group),
                before=before.get(group[0].nodes[0], ()),
            )
            for path, ((role, value), group) in zip(paths, groups.items(), strict=True)
        ]


def _roles(graph: fx.Graph) -> tuple[dict[fx.Node, str], dict[fx.Node, tuple[fx.Node, ...]]]:
    """Return the roles of layers that attentions have, and what stands before those behind one."""
    roles: dict[fx.Node, str] = {}
    before: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for attention in find_once(graph, Attention):
        behind = {stream.output.node for stream in attention.streams if stream.output is not None}
        first = tuple(n.node for n in attention.layers if n.node not in behind)
        roles |= dict.fromkeys(first, INPUTS) | dict.fromkeys(behind, OUTPUT)
        before |= dict.fromkeys(behind, first)
    return roles, before
