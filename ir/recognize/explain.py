"""What recognition makes of a program: every parameter and every FLOP has an owner.

Regions are asked in the order of `KINDS`, then what lies around the blocks: embeddings, conditions,
transitions and heads. What none of them holds is listed as outside, by the kind of work it is; so
is what has the place of a branch or a head and does something that neither is known to do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from ..cost import is_view
from ..graphs import remembered
from ..program import Program
from ..regions import Region, find_once, local_path
from ..shapes import concrete
from .attention import Attention
from .block import Block
from .branch import Branch
from .calls import LAYOUT, calls_to, op
from .embedding import Embedding
from .experts import Experts
from .feed_forward import FeedForward
from .flow import NotRecognized
from .modulation import Modulation
from .norm import Norm
from .plain import oddity_of, works
from .spelled import TransposedLinear
from .surroundings import (
    CONDITION,
    EMBEDDING,
    HEAD,
    TRANSITION,
    Surroundings,
    connected,
    surroundings_of,
)
from .work import node_work

KINDS: tuple[type[Region], ...] = (
    Attention, FeedForward, Experts, Branch, Modulation, Norm, Embedding, Block
)  # fmt: skip
AROUND = (EMBEDDING, CONDITION, TRANSITION, HEAD)
_PRODUCT = "multiplies with a weight and is no `linear`; canonicalize first"
_SOFTMAX = "is a softmax of its own; canonicalize joins it with its products"


@dataclass(frozen=True)
class Share:
    """What one kind of region, or one op outside of all, accounts for.

    Attributes:
        owner: Kind of region, a block owning what its sublayers and norms do not; what lies around
            the blocks: `embedding`, `condition`, `transition` or `head`. For all other nodes
            `outside: linear`, `convolution`, `elementwise`, or `other` (views); `outside: branch`
            and `outside: block` for parts of them that do what is not understood.
        regions: How many regions of the kind the model has; of what lies around the blocks, how
            many connected parts that compute something.
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
    around = surroundings_of(program)
    costs = {n: node_work(n, size) for graph in program.graphs.values() for n in graph.nodes}
    owners = {key: _owners(graph, costs, around) for key, graph in program.graphs.items()}
    times = Counter(key for name in (None, *program.instances) for key in program.scope(name))
    flops: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    regions = _around(around)
    for key, graph in program.graphs.items():
        regions.update({kind.kind: len(find_once(graph, kind)) * times[key] for kind in KINDS})
        for node in graph.nodes:
            work, stored = costs[node]
            flops[owners[key][node]] += sum(work.values()) * times[key]
            parameters[owners[key][node]] += stored * times[key]
    for owner, count in _read(program, owners):
        parameters[owner] += count
    names = list(dict.fromkeys((*(kind.kind for kind in KINDS), *AROUND)))
    others = sorted({*flops, *parameters} - set(names), key=lambda o: -flops[o])
    shares = [Share(o, regions[o], parameters[o], flops[o]) for o in (*names, *others)]
    misses = [
        _miss(program, key, miss, times[key])
        for key, graph in program.graphs.items()
        for miss in near_misses(graph)
        if owners[key][miss.node] not in AROUND or miss.nearest != FeedForward.kind
    ]
    keys = {graph: key for key, graph in program.graphs.items()}
    odd = [(keys[miss.node.graph], miss) for miss in around.odd]
    misses += [_miss(program, key, miss, times[key]) for key, miss in odd]
    used = tuple(share for share in shares if share.regions or share.parameters or share.flops)
    return Explanation(used, tuple(misses))


def near_misses(graph: fx.Graph) -> list[NotRecognized]:
    """Return what a graph nearly has, with the first node that disagrees."""
    attentions = find_once(graph, Attention)
    found = [miss for attention in attentions for miss in attention.misses()]
    found += [*FeedForward.misses(graph), *Block.misses(graph)]
    found += [odd for _, odd in unknown_parts(graph)]
    inside = {n for region in (*attentions, *find_once(graph, Experts)) for n in region.nodes}
    products = [n for r in find_once(graph, TransposedLinear) for n in r.nodes if works(n)]
    found += [NotRecognized("linear", node, _PRODUCT) for node in products]
    softmaxes = [node for node in calls_to(graph, ["softmax"]) if node not in inside]
    return [*found, *(NotRecognized("attention", node, _SOFTMAX) for node in softmaxes)]


def _around(around: Surroundings) -> Counter[str]:
    """Count the parts that lie around the blocks, tables left out: they are counted already."""
    tables = LAYOUT | {"embedding", "quantized_embedding"}
    return Counter(
        {
            role: sum(any(op(n) not in tables for n in part) for part in around.components(role))
            for role in AROUND
        }
    )


Costs = Mapping[fx.Node, tuple[Mapping[str, int], int]]


def _owners(graph: fx.Graph, costs: Costs, around: Surroundings) -> dict[fx.Node, str]:
    """Name the first kind of region that holds each node, its role, or the work it does outside."""
    owners = {
        node: around.roles.get(node) or f"outside: {next(iter(costs[node][0]))}"
        for node in graph.nodes
    }
    for kind in reversed(KINDS):
        for region in find_once(graph, kind):
            owners.update(dict.fromkeys(region.nodes, kind.kind))
    for nodes, odd in unknown_parts(graph):
        owners.update(dict.fromkeys(nodes, f"outside: {odd.nearest}"))
    for node in reversed(graph.nodes):  # what lays out a weight belongs to who reads it
        if is_view(node) and node.users and all(n.op == "get_attr" for n in node.all_input_nodes):
            owners[node] = owners[next(iter(node.users))]
    return owners


Unknown = tuple[Sequence[fx.Node], NotRecognized]


def unknown_parts(graph: fx.Graph) -> list[Unknown]:
    """Return the branches that do what is not understood, and what else of that kind blocks hold.

    A block may hold single layers beside its sublayers, as one that makes an attention's keys
    fewer, but no more than one in a chain.
    """
    return remembered(graph, "unknown parts", lambda graph: list(_unknown_parts(graph)))


def _unknown_parts(graph: fx.Graph) -> Iterator[Unknown]:
    known = {
        n for kind in KINDS if kind is not Block for r in find_once(graph, kind) for n in r.nodes
    }
    for branch in find_once(graph, Branch):
        if branch.odd:
            yield branch.nodes, branch.odd
    for block in find_once(graph, Block):
        for part in connected([n for n in block.nodes if n not in known]):
            odd = oddity_of(part, Block.kind, is_class=True, may_add=True, longest=1)
            if odd:
                yield part, odd


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
    for key in program.scope():
        for node in slots[key]:
            yield from of(key, node, str(node.target))
    for name, instance in program.instances.items():
        for key in program.scope(name):
            for node in slots[key]:
                yield from of(key, node, instance.weights[str(node.target)])
    yield "outside: unread", sum(left.values())


def _miss(program: Program, key: str, miss: NotRecognized, times: int) -> NearMiss:
    first = next((n for n in program.instances if key in program.scope(n)), "")
    path = ".".join(filter(None, (first, local_path(miss.node))))
    where = f"{path} (node {miss.node.name})" if path else f"node {miss.node.name}"
    return NearMiss(miss.nearest, where, times, miss.reason)
