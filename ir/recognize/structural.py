"""Calls of structural ops, for backends that put something faster in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..ops import OPS
from ..regions import Region, local_path, unique_paths
from .calls import arguments


@dataclass(frozen=True, kw_only=True, eq=False)
class StructuralCall(Region):
    """One call of a structural op on computed values, all other tensors being weights."""

    kind: ClassVar[str] = "structural call"

    @property
    def op(self) -> str:
        """Name of the op, a key of `OPS`."""
        return str(self.nodes[0].target)

    @property
    def input(self) -> Tensor:
        """The first value as the graph records it: type and symbolic shape, no data."""
        value = self.inputs[0].meta["val"]
        assert isinstance(value, Tensor)
        return value

    def arguments(self) -> dict[str, Any]:
        """Return weights, as this instance has them, and literals by argument name."""
        return {
            name: self.tensor(value) if isinstance(value, fx.Node) else value
            for name, value in arguments(self.nodes[0]).items()
            if value not in self.inputs
        }

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every call of a structural op whose weights are all stored."""
        found = [(node, _values(node)) for node in graph.nodes if str(node.target) in OPS]
        calls = [(n, values) for n, values in found if len(values) == OPS[str(n.target)].values]
        paths = unique_paths([local_path(node) for node, _ in calls])
        return [
            cls(path=path, nodes=(node,), inputs=tuple(values), outputs=(node,))
            for (node, values), path in zip(calls, paths, strict=True)
        ]


def _values(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that are computed, as opposed to stored, in the op's order."""
    given = arguments(node)
    order = (given.get(argument.name) for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return [each for each in order if isinstance(each, fx.Node) and each.op != "get_attr"]
