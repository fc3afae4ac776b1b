"""Branches of a stream that are neither attention nor feed-forward network.

    y = x + mix(norm(x))        a depthwise convolution, a pool, a recurrence, one step of a descent

They are found from the other end: at an addition one of whose operands is made of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import output_nodes, remembered
from ..regions import Region, find_once, unique_paths
from .attention import Attention
from .calls import LAYERS, LAYOUT, joint_path, op, readers, shape
from .convolution import is_convolution, is_pointwise
from .experts import Experts
from .feed_forward import FeedForward
from .flow import Flow, NotRecognized, flow_of
from .path import nodes_between, value_of
from .plain import oddity_of, works
from .residual import Residual, residual_of, ways_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch(Region):
    """A sublayer of another kind.

    Attributes:
        x: What it reads of the stream, norm and modulation before it left out.
        y: What it returns.
        ops: The ops that do its work, in order, each once.
        mixes: `tokens` if one of them looks at more than one position, else `channels`.
        residual: How it hangs on the stream.
    """

    x: fx.Node
    y: fx.Node
    ops: tuple[str, ...]
    mixes: str
    residual: Residual
    kind: ClassVar[str] = "branch"

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        return {"ops": list(self.ops), "mixes": self.mixes}

    @property
    def odd(self) -> NotRecognized | None:
        """The first node that is none of layers, convolutions and pools, or None.

        A branch that has one is known by its place on the stream alone: what it does is not.
        """
        return oddity_of(self.nodes, self.kind, is_class=True, may_add=True)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return what hangs on a stream and holds neither attention nor feed-forward network."""
        found = [_parts(flow_of(graph), way) for way, held in loose_ends(graph) if not held]
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


@dataclass(frozen=True)
class _Loop:
    """An addition with one operand made of the other.

    Attributes:
        stream: The operand that the other is made of.
        total: The addition; the end of the branch where nothing passes by it.
        inside: Nodes on the way from the stream to the other operand.
    """

    stream: fx.Node
    total: fx.Node
    inside: frozenset[fx.Node]


Held = tuple[Attention | FeedForward, ...]


def loose_ends(graph: fx.Graph) -> list[tuple[Residual, Held]]:
    """Return the ways of branches, each with the sublayers on it that had found none themselves."""
    return remembered(graph, "loose ends", _loose_ends)


def _loose_ends(graph: fx.Graph) -> list[tuple[Residual, Held]]:
    flow = flow_of(graph)
    attentions, networks = find_once(graph, Attention), find_once(graph, FeedForward)
    lost = {
        a.core: a for a in attentions if not any(isinstance(w, Residual) for w in ways_of(flow, a))
    }
    known = [way for way in flow.ways.values() if isinstance(way, Residual)]
    taken = {n for way in known for n in way.nodes}
    taken.update(n for norm in flow.norms for n in norm.nodes)
    known_parts = (*attentions, *networks, *find_once(graph, Experts))
    taken.update(n for r in known_parts if r not in lost.values() for n in r.nodes)
    left = {way.out for way in known}
    loops = [
        loop
        for loop in _outer(_loops(flow, taken), {way.total for way in known})
        if not _is_beside(flow, loop, left)
    ]
    found: list[tuple[Residual, Held]] = []
    for loop in loops:
        held: Held = tuple(lost[node] for node in loop.inside if node in lost)
        if held or any(works(node) for node in loop.inside):
            way, parts = _way(flow, loop), {node for region in held for node in region.nodes}
            rest = loop.inside - parts if held else frozenset()
            found.append((replace(way, nodes=way.nodes | rest), held))
    ways = [*known, *(way for way, _ in found)]
    return found + [(_way(flow, loop), ()) for loop in _straight(flow, ways)]


def _loops(flow: Flow, taken: set[fx.Node]) -> list[_Loop]:
    """Return the additions of something to what it is made of."""
    found = []
    for node in flow.graph.nodes:
        operands = node.all_input_nodes if op(node) in ("add", "sub") else []
        if node in taken or len(operands) != 2 or any(shape(n) != shape(node) for n in operands):
            continue
        stream, end = sorted(operands, key=flow.position.__getitem__)
        if op(node) == "sub" and node.args[0] is not stream:
            continue
        inside = nodes_between(flow, stream, end)
        if inside:
            found.append(_Loop(stream, node, inside))
    return found


def _is_beside(flow: Flow, loop: _Loop, left: set[fx.Node]) -> bool:
    """Whether a loop returns to a normalised copy of a stream instead of the stream."""
    norm = flow.norm_to.get(loop.stream)
    return norm is not None and norm.inputs[0] in left


def _outer(loops: list[_Loop], totals: set[fx.Node]) -> list[_Loop]:
    """Return the loops that are sublayers.

    One inside another is a part of it; one around several is a long way past all of them.
    """
    ends = {loop.total: loop for loop in loops}
    parts: set[fx.Node] = set()
    kept = []
    for loop in reversed(loops):
        if loop.total in parts:
            continue
        inner = [node for node in loop.inside if node in ends]
        if len(inner) < 2 and totals.isdisjoint(loop.inside):
            parts.update(inner)
            kept.append(loop)
    return kept[::-1]


def _straight(flow: Flow, ways: list[Residual]) -> Iterator[_Loop]:
    """Yield branches that nothing passes by: what is done to a stream between two sublayers."""
    read = {value_of(way.stream) for way in ways}
    made = {value_of(way.out) for way in ways}
    results = [n for n in output_nodes(flow.graph) if value_of(n) not in made]
    targets = sorted({*(read - made), *results}, key=flow.position.__getitem__)
    for start in sorted(made - read, key=flow.position.__getitem__):
        later = (n for n in targets if flow.position[n] > flow.position[start])
        end = next((n for n in later if shape(n) == shape(start)), None)
        inside = nodes_between(flow, start, end) if end is not None else frozenset()
        alone = all(user in inside for user in readers(start))
        if end is not None and alone and any(works(node) for node in inside):
            yield _Loop(start, end, inside)


def _way(flow: Flow, loop: _Loop) -> Residual:
    """Return the way of a branch: norm and modulation before it, gate and norm after it."""
    x, y = _core(flow, loop)
    way = residual_of(flow, "block", (x,), y)
    if isinstance(way, Residual) and way.total is loop.total:
        return way
    norm = flow.norm_to.get(x) if x is not loop.stream else None
    sign = 0 if loop.total in loop.inside else -1 if op(loop.total) == "sub" else 1
    nodes = {loop.total} - loop.inside | set(norm.nodes if norm else ())
    return Residual(
        stream=loop.stream, total=loop.total, out=loop.total, nodes=frozenset(nodes), sign=sign,
        norm_before=norm,
    )  # fmt: skip


def _core(flow: Flow, loop: _Loop) -> tuple[fx.Node, fx.Node]:
    """Return what does the work of a branch reads and returns."""
    x, inside = loop.stream, loop.inside
    norm = flow.norm_from.get(x)
    if norm and all(user in norm.nodes for user in readers(x) if user in inside):
        x = norm.outputs[0]
    operands = [n for n in loop.total.all_input_nodes if n in inside]
    if loop.total in inside or len(operands) != 1:
        return x, loop.total
    (y,) = operands
    while op(y) in {"mul", "div"} | LAYOUT and len(readers(y)) == 1:
        sources = [n for n in y.all_input_nodes if n in inside]
        if len(sources) != 1 or sources[0] in (x, *(norm.nodes if norm else ())):
            break
        (y,) = sources
    after = flow.norm_to.get(y)
    if after and after.inputs[0] in inside and after is not norm:
        y = after.inputs[0]
    return x, y


def _parts(flow: Flow, way: Residual) -> dict[str, Any]:
    """Return the fields of a branch, its path among them."""
    before = way.norm_before.outputs[0] if way.norm_before else way.stream
    inside = set(nodes_between(flow, way.stream, way.total)) - way.nodes - {way.total}
    if way.sign == 0:
        inside |= {way.total}
    ends = [n for n in inside if not inside.issuperset(n.users)]
    y = max(ends, key=flow.position.__getitem__)
    working = [n for n in sorted(inside, key=flow.position.__getitem__) if works(n)]
    return {
        **flow.enclose(inside, y),
        "path": joint_path(working),
        "x": before,
        "y": y,
        "ops": tuple(dict.fromkeys(_name(n) for n in working)),
        "mixes": "tokens" if any(_looks_around(n) for n in working) else "channels",
        "residual": way,
    }


def _looks_around(node: fx.Node) -> bool:
    """Whether an op reads more than one position."""
    return op(node) not in LAYERS | {"mm", "addmm"} and not is_pointwise(node)


def _name(node: fx.Node) -> str:
    return "pointwise" if is_convolution(node) and is_pointwise(node) else op(node)
