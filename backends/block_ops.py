"""Write operations on blocks in ops of ATen, for backends that translate those.

The ops stay in a program, where one node says what is meant; a compiler is given what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from torch import fx

from ..ir.ops import block_product, block_tables, block_values
from ..ir.program import Program
from ..ir.region_module import Call, RegionModule
from ..ir.regions import Region, local_path, regions, unique_paths
from ..ir.rewrite import rewrite

SPELLED: Final[Mapping[object, Callable[..., Any]]] = {
    block_values.ROUND: block_values.spell_round,
    block_values.WEIGHT: block_values.spell_weight,
    block_values.EMBEDDING: block_values.spell_embedding,
    block_product.LINEAR: block_product.spell_linear,
    block_product.MATMUL: block_product.spell_matmul,
    block_tables.ACTIVATION: block_tables.spell_activation,
    block_tables.SOFTMAX: block_tables.spell_softmax,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockCall(Region):
    """One call of an op on blocks."""

    kind: ClassVar[str] = "block call"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the calls in a graph, in order."""
        nodes = [node for node in graph.nodes if node.target in SPELLED]
        paths = unique_paths([local_path(node) for node in nodes])
        return [
            cls(path=path, nodes=(node,), inputs=_values(node), outputs=(node,))
            for node, path in zip(nodes, paths, strict=True)
        ]


def spell_blocks(program: Program) -> Program:
    """Return a program without ops on blocks; they are spelled out where they stood."""
    found = [(call, _spelled(call)) for call in regions(program, BlockCall)]
    return rewrite(program, found, by="block-ops") if found else program


def _spelled(call: BlockCall) -> RegionModule:
    (node,) = call.nodes
    step = Call(SPELLED[node.target], node.args, dict(node.kwargs))
    return RegionModule(call, calls={node: step})


def _values(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(source for source in node.all_input_nodes if source.op != "get_attr")
