"""Modulation: what a condition does to the sublayers of a block.

    shift, scale, gate = linear(silu(condition)).chunk(3)
    y = x + gate * sublayer(norm(x) * (1 + scale) + shift)

Roles are found by what is done with a value, never by its place among the chunks.

Source: Peebles and Xie, 2023 (adaLN), arXiv:2212.09748; Chen et al., 2023 (adaLN-single, one layer
for all blocks and a table for each), arXiv:2310.00426.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import fx

from ..graphs import remembered
from ..program import MAIN, Program
from ..regions import Region, unique_paths
from .activation import activation_of
from .calls import LAYOUT, is_layer, joint_path, op, peel
from .flow import Flow, flow_of
from .group import Group, groups_of
from .layer import Layer
from .path import layout_between
from .place import Place, made_at
from .rows import Rows

_CURVES = {"tanh", "sigmoid", "neg"}


@dataclass(frozen=True)
class Source:
    """Where a factor or summand of a sublayer comes from.

    Attributes:
        node: The layer, placeholder or other node that computes it; a weight where it is stored.
        table: Weight that is added to it, one per block, or None.
        nodes: Nodes from `node` on, `node` not counted.
        stored: Whether it depends on no input: LayerScale.
    """

    node: fx.Node
    table: fx.Node | None
    nodes: frozenset[fx.Node]
    stored: bool

    @property
    def kind(self) -> str:
        """`parameter`, `table` (a stored one plus a computed one) or `modulation`."""
        return "parameter" if self.stored else "table" if self.table else "modulation"


def source_of(flow: Flow, value: fx.Node) -> Source:
    """Follow a factor or summand back through chunks, `1 + scale` and tables."""
    nodes: set[fx.Node] = set()
    table, node = None, value
    while node.op == "call_function" and flow.reads[node]:
        tensors = node.all_input_nodes
        live = [n for n in tensors if flow.reads[n]]
        plain = op(node) in LAYOUT | _CURVES or op(node) in ("add", "sub", "mul", "div")
        if not plain or (len(live) != 1 and op(node) not in LAYOUT):
            break
        if op(node) in ("add", "sub") and len(tensors) == 2:
            (stored,) = (n for n in tensors if n is not live[0])
            table = peel(stored)
            nodes |= layout_between(stored, table)
        nodes.add(node)
        node = live[0]
    return Source(node, table, frozenset(nodes), not flow.reads[value])


@dataclass(frozen=True)
class Chunk:
    """One value of a modulation.

    Attributes:
        role: `scale` (of what a norm returns), `shift` or `gate` (of what the sublayer returns).
        sublayer: Which sublayer of the block, counted from 0.
        stream: Which of the sublayer's streams, counted from 0.
        value: The value that is multiplied or added.
        layer: Which of the modulation's layers it comes from; None for none of them.
        rows: Which of its features; None when they are not followed.
    """

    role: str
    sublayer: int
    stream: int
    value: fx.Node
    layer: int | None = None
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Modulation(Region):
    """Shifts, scales and gates of one block, and what makes them of the condition.

    Attributes:
        chunks: The values, sublayer by sublayer.
        layers: Layers that make them; for a shared one seen from a block of its own graph, the
            layer in the main graph.
        tables: Weights added to what a shared layer returns, [chunks, dim] or so.
        conditions: What the layers read before their activation; their result where they lie
            outside of the block's graph.
        form: `per-block`, or `shared` when blocks read the same layer.
    """

    chunks: tuple[Chunk, ...]
    layers: tuple[Layer, ...]
    tables: tuple[fx.Node, ...]
    conditions: tuple[fx.Node, ...]
    form: str
    kind: ClassVar[str] = "modulation"

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        roles = [[chunk.sublayer, chunk.stream, chunk.role] for chunk in self.chunks]
        return {"form": self.form, "has_table": bool(self.tables), "chunks": roles}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        layers = tuple(layer.bind(program, graph, instance) for layer in self.layers)
        if not layers and instance is not None:
            layers = tuple(_outside(program, instance, self.conditions))
        bound.__dict__["layers"] = layers
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the modulation of each block that has one, unless blocks share all of it."""
        return [m for m in modulations_of(graph) if isinstance(m, cls) and m.nodes]


def modulations_of(graph: fx.Graph) -> list[Modulation | None]:
    """Return the modulation of each block of a graph, None for those without."""
    return list(remembered(graph, "modulations", _modulations))


Use = tuple[Chunk, Source]


def _modulations(graph: fx.Graph) -> list[Modulation | None]:
    flow, groups = flow_of(graph), groups_of(graph)
    uses = [list(_uses(flow, group)) for group in groups]
    reach = [{n for _, source in group for n in _reach(source)} for group in uses]
    owners = Counter(node for nodes in reach for node in nodes)
    owners.update(node for nodes in reach for node in _called_with(flow, nodes))
    found = [
        _parts(flow, group, {n for n in nodes if owners[n] == 1})
        for group, nodes in zip(uses, reach, strict=True)
    ]
    paths = iter(unique_paths([parts.pop("path") for parts in found if parts]))
    return [Modulation(path=next(paths), **parts) if parts else None for parts in found]


def _uses(flow: Flow, group: Group) -> Iterator[Use]:
    """Yield what modulates a block, with its source, unless it is made of the stream itself."""
    for index, sublayer in enumerate(group.sublayers):
        for stream, way in enumerate(sublayer.residuals):
            for role in ("shift", "scale", "gate"):
                value = getattr(way, role, None)
                source = source_of(flow, value) if value is not None else None
                if value is None or source is None or source.stored:
                    continue
                if flow.reads[way.stream] & ~flow.reads[source.node]:  # type: ignore[union-attr]
                    yield Chunk(role, index, stream, value), source


def _reach(source: Source) -> set[fx.Node]:
    """Return the nodes that make a chunk, down to the condition."""
    if not is_layer(source.node):
        return set(source.nodes)
    _, nodes = _condition(source.node)
    return {source.node, *source.nodes, *nodes}


def _called_with(flow: Flow, nodes: set[fx.Node]) -> set[fx.Node]:
    """Return which nodes other blocks are called with, or with what is made of them."""
    found: set[fx.Node] = set()
    for node in sorted(nodes, key=flow.position.__getitem__, reverse=True):
        if any(user.op == "call_module" or user in found for user in node.users):
            found.add(node)
    return found


def _condition(layer: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
    """Return what a layer reads before the activation, and the nodes of that."""
    value: Any = layer.args[0]
    activation = activation_of(peel(value))
    if activation is None:
        return value, set()
    return activation.source, layout_between(value, activation.result) | set(activation.nodes)


def _parts(flow: Flow, uses: list[Use], own: set[fx.Node]) -> dict[str, Any] | None:
    """Return the fields of a modulation, its path among them."""
    if not uses:
        return None
    nodes = dict.fromkeys(source.node for _, source in uses)
    layers = [node for node in nodes if is_layer(node)]
    chunks = [
        replace(
            chunk,
            layer=layers.index(source.node) if source.node in layers else None,
            rows=_rows(flow, chunk.value, source.node),
        )
        for chunk, source in uses
    ]
    conditions = [_condition(node)[0] if node in layers else node for node in nodes]
    values = dict.fromkeys(chunk.value for chunk in chunks)
    shared = {"nodes": (), "inputs": tuple(nodes), "outputs": tuple(values)}
    return {
        **(flow.enclose(own, *(v for v in values if v in own)) if own else shared),
        "path": joint_path(sorted(own, key=flow.position.__getitem__)),
        "chunks": tuple(chunks),
        "layers": tuple(Layer.of(node, Layer.all_features(node)) for node in layers),
        "tables": tuple(dict.fromkeys(s.table for _, s in uses if s.table is not None)),
        "conditions": tuple(dict.fromkeys(conditions)),
        "form": "per-block" if own.issuperset(layers) and layers else "shared",
    }


def _rows(flow: Flow, value: fx.Node, layer: fx.Node) -> Rows | None:
    """Return which features of a layer a chunk holds, `1 + scale` taken for `scale`."""
    while op(value) in ("add", "sub") and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    origin = flow.origins[value]
    return origin.features.rows if origin.anchor is layer and origin.features else None


def _outside(program: Program, instance: str, conditions: tuple[fx.Node, ...]) -> Iterator[Layer]:
    """Yield the layers of the main graph that an instance gets its modulation from."""
    for node in conditions:
        source = made_at(program, Place(instance, node))
        layer = peel(source.node) if source.instance is None else node
        if is_layer(layer) and layer.graph is program.main:
            yield Layer.of(layer, Layer.all_features(layer)).bind(program, MAIN, None)
