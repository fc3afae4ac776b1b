"""Embedding tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, fx

from ..graphs import aten
from ..regions import Region, local_path, unique_paths


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Region):
    """`y[i] = weight[ids[i]]`, with a weight that is a parameter.

    Attributes:
        weight_node: The `get_attr` node of the table, [vocab, dim].
    """

    weight_node: fx.Node
    kind: ClassVar[str] = "embedding"

    @property
    def weight(self) -> Tensor:
        """[vocab, dim]."""
        return self.tensor(self.weight_node)

    @property
    def weight_is_shared(self) -> bool:
        """Whether anything else of the model reads the same table."""
        return self.is_shared(self.weight_node)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every `embedding` whose table is a parameter."""
        nodes = [
            node
            for node in graph.nodes
            if node.target is aten.embedding.default and node.args[0].op == "get_attr"
        ]
        paths = unique_paths([local_path(node) for node in nodes])
        return [
            cls(
                path=path,
                nodes=(node,),
                inputs=(node.args[1],),
                outputs=(node,),
                weight_node=node.args[0],
            )
            for node, path in zip(nodes, paths, strict=True)
        ]
