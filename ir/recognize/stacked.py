"""Matrices that experts have one each of, in one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, fx

from ..regions import Region, unique_paths
from .calls import arguments, calls_to

_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedWeight(Region):
    """A matrix of every expert, stored as one tensor of floats.

    It is a region without inputs: what stands in its place makes the tensor of other weights.
    """

    kind: ClassVar[str] = "expert weights"

    @property
    def weight(self) -> Tensor:
        """[experts, out_features, in_features]."""
        return self.tensor(self.nodes[0])

    @property
    def weight_is_shared(self) -> bool:
        """Whether anything else of the model reads the same tensor."""
        return self.is_shared(self.nodes[0])

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the matrices of all experts of a graph; the path of one is that of its tensor."""
        given = [arguments(call) for call in calls_to(graph, ["moe_ffn"])]
        nodes = [call[name] for call in given for name in _MATRICES if call.get(name) is not None]
        stored = dict.fromkeys(node for node in nodes if node.op == "get_attr")
        paths = unique_paths([str(node.target) for node in stored])
        return [
            cls(path=path, nodes=(node,), inputs=(), outputs=(node,))
            for node, path in zip(stored, paths, strict=True)
        ]
