"""What recognition makes of a program: every parameter and every FLOP has an owner.

Regions are asked in the order of `KINDS`; what none of them holds is listed as
outside, by the kind of work it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx

from ..cost import is_view, node_flops
from ..ops import OPS
from ..program import MAIN, Program
from ..regions import Region, find_once, local_path
from ..shapes import Size, concrete
from .attention import Attention
from .block import Block
from .calls import op
from .embedding import Embedding
from .feed_forward import FeedForward
from .flow import NotRecognized
from .norm import Norm

KINDS: tuple[type[Region], ...] = (Attention, FeedForward, Norm, Embedding, Block)
_SPELLED = {
    "addmm": ("linear", "multiplies with a weight stored as [in, out]; canonicalize first"),
    "mm": ("linear", "multiplies with a weight stored as [in, out]; canonicalize first"),
    "softmax": ("attention", "is a softmax of its own; canonicalize joins it with its products"),
}


@dataclass(frozen=True)
class Share:
    """What one kind of region, or one op outside of all, accounts for.

    Attributes:
        owner: Kind of region, a block owning what its sublayers and norms do not. For nodes of no
            region: `outside: linear`, `convolution`, `elementwise`, or `other` (views).
        regions: How many regions of the kind the model has.
        parameters: Weights read there first, quantized ones as the weights they stand for.
        flops: Operations of one call.
    """

    owner: str
    regions: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class NearMiss:
    """Something that nearly is a region.

    Attributes:
        nearest: Kind of region, or its part, as in `attention.output`.
        where: Module path, and name of the node in its graph.
        count: Block instances it occurs in.
        reason: Completes the sentence "the node ...".
    """

    nearest: str
    where: str
    count: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """An account of a program that adds up.

    Attributes:
        shares: Owners of parameters and FLOPs.
        near_misses: What nearly was a region, each with the first node that disagrees.
    """

    shares: tuple[Share, ...]
    near_misses: tuple[NearMiss, ...]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(share.parameters for share in self.shares)

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(share.flops for share in self.shares)

    def inside(self) -> tuple[float, float]:
        """Return the fractions of parameters and FLOPs that regions own."""
        owned = [share for share in self.shares if not share.owner.startswith("outside")]
        return (
            sum(share.parameters for share in owned) / max(self.parameters, 1),
            sum(share.flops for share in owned) / max(self.flops, 1),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        parameters, flops = self.inside()
        return asdict(self) | {"inside": {"parameters": parameters, "flops": flops}}

    def __str__(self) -> str:
        """Render as a table, near misses below."""
        rows = [("", "regions", "parameters", "%", "FLOPs", "%")]
        for s in (*self.shares, Share("total", 0, self.parameters, self.flops)):
            portions = (s.parameters / max(self.parameters, 1), s.flops / max(self.flops, 1))
            percents = [f"{100 * portion:.1f}" for portion in portions]
            count = str(s.regions or "")
            rows.append(
                (s.owner, count, f"{s.parameters:,}", percents[0], f"{s.flops:,}", percents[1])
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
            for row in rows
        ]
        lines += [f"no {m.nearest}: {m.count} x {m.where} {m.reason}" for m in self.near_misses]
        return "\n".join(line.rstrip() for line in lines)


def explain(program: Program) -> Explanation:
    """Account for all parameters and FLOPs of a program, once per block class."""
    size = concrete(program, None)
    costs = {n: _node_cost(n, size) for graph in program.graphs.values() for n in graph.nodes}
    owners = {key: _owners(graph, costs) for key, graph in program.graphs.items()}
    times = Counter(instance.block for instance in program.instances.values()) + Counter([MAIN])
    flops: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    regions: Counter[str] = Counter()
    for key, graph in program.graphs.items():
        regions.update({kind.kind: len(find_once(graph, kind)) * times[key] for kind in KINDS})
        for node in graph.nodes:
            work, stored = costs[node]
            flops[owners[key][node]] += sum(work.values()) * times[key]
            parameters[owners[key][node]] += stored * times[key]
    for owner, count in _read(program, owners):
        parameters[owner] += count
    names = [kind.kind for kind in KINDS]
    others = sorted({*flops, *parameters} - set(names), key=lambda o: -flops[o])
    shares = [Share(o, regions[o], parameters[o], flops[o]) for o in (*names, *others)]
    misses = [
        _miss(program, key, miss, times[key])
        for key, graph in program.graphs.items()
        for miss in near_misses(graph)
    ]
    used = tuple(share for share in shares if share.regions or share.parameters or share.flops)
    return Explanation(used, tuple(misses))


def near_misses(graph: fx.Graph) -> list[NotRecognized]:
    """Return what a graph nearly has, with the first node that disagrees."""
    found = [miss for attention in find_once(graph, Attention) for miss in attention.misses()]
    found += [*FeedForward.misses(graph), *Block.misses(graph)]
    for node in graph.nodes:
        nearest, reason = _SPELLED.get(op(node), ("", ""))
        if nearest:
            found.append(NotRecognized(nearest, node, reason))
    return found


Costs = Mapping[fx.Node, tuple[Mapping[str, int], int]]


def _owners(graph: fx.Graph, costs: Costs) -> dict[fx.Node, str]:
    """Name the first kind of region that holds each node, or the kind of work it does outside."""
    owners = {node: f"outside: {next(iter(costs[node][0]))}" for node in graph.nodes}
    for kind in reversed(KINDS):
        for region in find_once(graph, kind):
            owners.update(dict.fromkeys(region.nodes, kind.kind))
    return owners


def _node_cost(node: fx.Node, size: Callable[[Size], int]) -> tuple[Mapping[str, int], int]:
    """Return the FLOPs of a node by kind of work, and the weights stored in its codes."""
    if node.op != "call_function" or is_view(node):
        return {"other": 0}, 0

    def shape(n: fx.Node) -> tuple[int, ...]:
        return tuple(size(s) for s in n.meta["val"].shape)

    shapes = [shape(n) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    structural = OPS.get(str(node.target))
    stored = structural.weights(shapes, shape(node)) if structural else 0
    return node_flops(node, shapes, shape(node)), stored


def _read(
    program: Program, owners: Mapping[str, Mapping[fx.Node, str]]
) -> Iterator[tuple[str, int]]:
    """Yield the first reader of every parameter with its size; unread ones come last."""
    left = {name: math.prod(program.tensors[name].shape) for name in program.parameters}

    def of(key: str, node: fx.Node, name: str) -> Iterator[tuple[str, int]]:
        if name in left and node.users:
            yield owners[key][next(iter(node.users))], left.pop(name)

    slots = {
        key: [node for node in graph.nodes if node.op == "get_attr"]
        for key, graph in program.graphs.items()
    }
    for node in slots[MAIN]:
        yield from of(MAIN, node, str(node.target))
    for instance in program.instances.values():
        for node in slots[instance.block]:
            yield from of(instance.block, node, instance.weights[str(node.target)])
    yield "outside: unread", sum(left.values())


def _miss(program: Program, key: str, miss: NotRecognized, times: int) -> NearMiss:
    first = program.instances_of(key)[0] if key != MAIN else ""
    path = ".".join(filter(None, (first, local_path(miss.node))))
    where = f"{path} (node {miss.node.name})" if path else f"node {miss.node.name}"
    return NearMiss(miss.nearest, where, times, miss.reason)
