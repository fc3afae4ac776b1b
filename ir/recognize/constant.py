"""Expressions that depend on no input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from ..branches import is_cond
from ..graphs import is_mutable
from ..regions import Region, local_path, unique_paths
from ..run import run_nodes
from ..shapes import describe


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstantExpression(Region):
    """The largest expression over weights and literals that ends in one tensor.

    What is replaced is the end: expressions may share what leads there, which is dead when all of
    them are gone.

    Attributes:
        weights: The `get_attr` nodes it reads.
        steps: The nodes that compute it, in order.
    """

    weights: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    kind: ClassVar[str] = "constant"

    def replay(self, inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
        """Run the whole expression; it has no inputs."""
        env = run_nodes(self.program, self.steps, {}, self.instance, dtype)
        return [env[node] for node in self.outputs]

    def evaluate(self) -> Tensor:
        """Compute the value, as this instance has it."""
        value = self.replay([])[0]
        assert isinstance(value, Tensor)
        return value

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the maximal constant expressions of a graph."""
        constant: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and _pure(node)):
                if all(source in constant for source in node.all_input_nodes):
                    constant.add(node)
        roots = [
            node
            for node in graph.nodes
            if node in constant
            and node.op == "call_function"
            and isinstance(node.meta.get("val"), Tensor)
            and any(user not in constant for user in node.users)
        ]
        paths = unique_paths([f"{local_path(r)}.{r.name}".strip(".") for r in roots])
        return [cls._of(root, path) for root, path in zip(roots, paths, strict=True)]

    @classmethod
    def _of(cls, root: fx.Node, path: str) -> Self:
        members: dict[fx.Node, None] = {}
        pending = [root]
        while pending:
            node = pending.pop()
            if node not in members:
                members[node] = None
                pending += node.all_input_nodes
        order = {node: i for i, node in enumerate(root.graph.nodes)}
        ordered = sorted(members, key=order.__getitem__)
        return cls(
            path=path,
            nodes=(root,),
            inputs=(),
            outputs=(root,),
            steps=tuple(n for n in ordered if n.op == "call_function"),
            weights=tuple(n for n in ordered if n.op == "get_attr"),
        )


def _pure(node: fx.Node) -> bool:
    """Whether the node gives the same value on every call: static shape, no randomness."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    symbolic = "Sym" in repr(describe(node.meta.get("val"))) or any(
        isinstance(size, torch.SymInt) for size in getattr(node.meta.get("val"), "shape", ())
    )
    return not (seeded or symbolic or is_mutable(node) or is_cond(node))
