"""Linear layers some of whose output features nobody reads.

shift, scale, gate, _, _, _ = modulation(silu(condition)).chunk(6)

What stood behind the last three is gone, as after another pass. The region goes from the layer to
the first values that hold a part of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import output_nodes
from ..regions import Region, find_once, unique_paths
from .calls import LAYOUT, op
from .flow import Flow, flow_of
from .linear import Linear
from .rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class IdleFeatures(Region):
    """A linear layer and the parts of its output that are read.

    Attributes:
        linear: The layer.
        parts: Per output of the region, the range (start, stop) of features it holds in order.
        features: How many features the layer has.
    """

    linear: Linear
    parts: tuple[tuple[int, int], ...]
    features: int
    kind: ClassVar[str] = "idle features"

    def bind(self, program: Any, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        bound.__dict__["linear"] = self.linear.bind(program, graph, instance)
        return bound

    @property
    def live(self) -> list[int]:
        """Features that some output holds, in order."""
        return sorted({row for part in self.parts for row in range(*part)})

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the layers of a graph that compute more than is read."""
        flow = flow_of(graph)
        kept = frozenset(output_nodes(graph))
        found = [(linear, _parts(flow, linear, kept)) for linear in find_once(graph, Linear)]
        paths = unique_paths([linear.path for linear, parts in found if parts])
        some = ((linear, parts) for linear, parts in found if parts)
        return [
            cls(path=path, linear=linear, features=_width(linear), **parts)
            for path, (linear, parts) in zip(paths, some, strict=True)
        ]


def _parts(flow: Flow, linear: Linear, kept: frozenset[fx.Node]) -> dict[str, Any] | None:
    """Return the fields of the region, or None when all features are read."""
    (layer,) = linear.outputs
    inside: set[fx.Node] = set()
    leaves: dict[fx.Node, tuple[int, int]] = {}
    pending = [layer]
    for node in pending:  # grows while it is walked
        if node in kept or not all(op(user) in LAYOUT for user in node.users):
            return None  # all features are read together
        inside.add(node)
        for user in node.users:
            rows = _rows(flow, user, layer)
            if rows is None:
                return None
            if rows.count == _width(linear):
                pending.append(user)
            elif rows.span is None or not _is_laid_out(flow, user):
                return None
            else:
                leaves[user] = rows.span
    inside |= set(leaves)
    live = {row for part in leaves.values() for row in range(*part)}
    if len(live) == _width(linear):
        return None
    fields = flow.enclose(set(linear.nodes) | inside, *leaves)
    return (
        {**fields, "parts": tuple(leaves.values())}
        if len(fields["outputs"]) == len(leaves)
        else None
    )


def _rows(flow: Flow, node: fx.Node, layer: fx.Node) -> Rows | None:
    origin = flow.origins[node]
    if op(node) in ("chunk", "split", "split_with_sizes", "unbind", "tensor_split"):
        return Rows.of(0, [(layer.meta["val"].shape[-1], 1)])
    return origin.features.rows if origin.anchor is layer and origin.features else None


def _is_laid_out(flow: Flow, node: fx.Node) -> bool:
    """Whether the features of a value lie along its last axes, in order."""
    features = flow.origins[node].features
    if features is None or features.axes is None:
        return False
    held = [axis for axis in features.axes if axis]
    step = 1
    for size, stride in reversed(held):
        if stride != step:
            return False
        step *= size
    tail = features.axes[len(features.axes) - len(held) :]
    return all(tail)


def _width(linear: Linear) -> int:
    return int(linear.outputs[0].meta["val"].shape[-1])
