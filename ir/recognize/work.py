"""What regions account for: parameters and FLOPs of their nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import fx

from ..cost import is_view, node_flops, results, tensor_arguments
from ..ops import OPS
from ..regions import Region
from ..shapes import Size


@dataclass(frozen=True)
class Work:
    """What a region accounts for.

    Attributes:
        parameters: Weights its nodes read, quantized ones as the weights they stand for.
        flops: Operations of one call; one multiply-add is two.
    """

    parameters: int
    flops: int

    def to_json(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


def node_work(node: fx.Node, size: Callable[[Size], int]) -> tuple[Mapping[str, int], int]:
    """Return the FLOPs of a node by kind of work, and the weights stored in its codes."""
    if node.op != "call_function" or is_view(node):
        return {"other": 0}, 0

    def shape(n: fx.Node) -> tuple[int, ...]:
        return tuple(size(s) for s in results(n.meta["val"])[0].shape)

    shapes = [shape(n) for n in tensor_arguments(node)]
    structural = OPS.get(str(node.target))
    stored = structural.weights(shapes, shape(node)) if structural else 0
    return node_flops(node, shapes, shape(node)), stored


def work_of(region: Region, size: Callable[[Size], int]) -> Work:
    """Count what a region accounts for, weights it shares with others included."""
    costs = [node_work(node, size) for node in region.nodes]
    read = {n for node in region.nodes for n in node.all_input_nodes if n.op == "get_attr"}
    names = {_name(region, node) for node in read}
    dense = sum(
        math.prod(region.program.tensors[name].shape) for name in names & region.program.parameters
    )
    stored = sum(count for _, count in costs)
    return Work(dense + stored, sum(sum(flops.values()) for flops, _ in costs))


def _name(region: Region, node: fx.Node) -> str:
    instance = region.program.instances[region.instance] if region.instance else None
    return instance.weights[str(node.target)] if instance else str(node.target)
