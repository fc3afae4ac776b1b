"""What values are made of: one forward pass per graph, which every finder of blocks reads.

Each value gets an *origin*: the node whose result it still is after views, splits, a norm, and the
multiply-adds of a rotary embedding. Following origins, `scaled_dot_product_attention` finds its
projections however they are reshaped, and a feed-forward network the halves of a fused layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from ..graphs import is_mutable, remembered
from .calls import LAYERS, LAYOUT, SPLITS, is_layer, op, peel, shape
from .features import Features
from .norm import Norm


@dataclass(frozen=True)
class NotRecognized:
    """What a finder did not understand.

    Attributes:
        nearest: The kind of region it would have been.
        node: The first node that disagrees.
        reason: Completes the sentence "the node ...".
    """

    nearest: str
    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        anchor: The node whose result it is, apart from what follows.
        features: Which of the anchor's output features, for a linear layer.
        norm: Norm it went through.
        factor: Number it was multiplied by since; None when parts differ.
        foreign: Other values it was multiplied by.
        mixed: Whether parts of it were added, swapped or negated.
        rotated: Whether parts of it were added after being multiplied by different values.
        copies: How often each head stands in it: key and value heads repeated for the queries.
    """

    anchor: fx.Node
    features: Features | None = None
    norm: Norm | None = None
    factor: float | None = 1.0
    foreign: tuple[fx.Node, ...] = ()
    mixed: bool = False
    rotated: bool = False
    copies: int = 1


class Flow:
    """Order, norms and origins of one graph.

    Attributes:
        position: Place of each node in the graph.
        norms: The norms.
        norm_to: Norm by its result.
        norm_from: Norm by what it reads.
        ways: What `residual_of` found, by result of a sublayer.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.norms = Norm.find(graph)
        self.norm_to = {norm.outputs[0]: norm for norm in self.norms}
        self.norm_from = {norm.inputs[0]: norm for norm in self.norms}
        self.ways: dict[fx.Node, Any] = {}
        self._projected: set[fx.Node] = set()

    @cached_property
    def origins(self) -> dict[fx.Node, Origin]:
        """Origin of every node."""
        found: dict[fx.Node, Origin] = {}
        for node in self.graph.nodes:
            found[node] = self._origin(node, found)
        return found

    def is_projected(self, anchor: fx.Node) -> bool:
        """Whether an anchor is a linear layer, or joins the results of several."""
        return anchor in self._projected

    @cached_property
    def reads(self) -> dict[fx.Node, int]:
        """Which placeholders each node depends on, one bit each."""
        found: dict[fx.Node, int] = {}
        bit = 1
        for node in self.graph.nodes:
            found[node] = 0
            if node.op == "placeholder":
                found[node], bit = bit, bit * 2
            for source in node.all_input_nodes:
                found[node] |= found[source]
        return found

    @cached_property
    def learned(self) -> set[fx.Node]:
        """Nodes that read the result of an embedding, a convolution or a matrix product."""
        heavy = LAYERS | {"embedding", "quantized_embedding", "addmm", "mm", "matmul", "bmm"}
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            name = op(node)
            if name in heavy or "conv" in name or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def enclose(self, core: set[fx.Node], result: fx.Node) -> dict[str, Any]:
        """Return nodes, inputs and outputs of the region around `core`, `result` first.

        What the core reads and is computed after the first of its nodes belongs to it as well: a
        replacement stands where the first node stood.
        """
        nodes, first = set(core), min(self.position[node] for node in core)
        pending = list(core)
        while pending:
            node = pending.pop()
            late = [n for n in node.all_input_nodes if self.position[n] > first]
            picks = [n for n in node.users if op(n) == "getitem"]
            for other in (*late, *picks):
                if other.op == "call_function" and other not in nodes and not is_mutable(other):
                    nodes.add(other)
                    pending.append(other)
        ordered = sorted(nodes, key=self.position.__getitem__)
        read = dict.fromkeys(n for node in ordered for n in node.all_input_nodes)
        seen = [n for n in ordered if not nodes.issuperset(n.users) and n is not result]
        return {
            "nodes": tuple(ordered),
            "inputs": tuple(n for n in read if n not in nodes and n.op != "get_attr"),
            "outputs": (result, *seen),
        }

    def between(self, value: fx.Node, anchor: fx.Node) -> set[fx.Node]:
        """Return the nodes that make `value` of `anchor`, without the anchor."""
        nodes: set[fx.Node] = set()
        pending = [value]
        while pending:
            node = pending.pop()
            if node is anchor or node in nodes or self.origins[node].anchor is not anchor:
                continue
            nodes.add(node)
            norm = self.norm_to.get(node)
            pending += [norm.inputs[0]] if norm else node.all_input_nodes
            nodes.update(norm.nodes if norm else ())
        return nodes

    def _origin(self, node: fx.Node, known: dict[fx.Node, Origin]) -> Origin:
        name = op(node)
        fresh = Origin(node, Features.of(node) if is_layer(node) else None)
        if is_layer(node) or (
            name == "cat" and all(is_layer(known[n].anchor) for n in node.all_input_nodes)
        ):
            self._projected.add(node)
        norm = self.norm_to.get(node)
        if norm is not None:
            return replace(known[norm.inputs[0]], norm=norm, factor=1.0)
        if name in LAYOUT and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            if name == "getitem" and op(source) not in SPLITS:
                return fresh  # one of several results, not a part of one
            return _moved(node, known[source])
        if name == "neg":
            return replace(known[node.all_input_nodes[0]], mixed=True)
        operands = [known[n] for n in node.all_input_nodes]
        if name in ("add", "sub", "cat", "stack") and len({o.anchor for o in operands}) == 1:
            return _joined(operands) if _all_tensors(node) else fresh
        if name in ("mul", "div"):
            return self._multiplied(node, known) or fresh
        return fresh

    def _multiplied(self, node: fx.Node, known: dict[fx.Node, Origin]) -> Origin | None:
        """Return the origin of a value times numbers or times values that come from elsewhere."""
        left, right = node.args[:2]
        if isinstance(left, fx.Node) and isinstance(right, int | float):
            factor = known[left].factor
            times = right if op(node) == "mul" else 1 / right if right else None
            return replace(known[left], factor=factor and times and factor * times)
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        for value, other in ((left, right), (right, left)):
            origin = known[value]
            if self.is_projected(origin.anchor) and not self.is_projected(known[other].anchor):
                turned = "complex" in str(getattr(node.meta.get("val"), "dtype", ""))
                foreign = tuple(dict.fromkeys((*origin.foreign, peel(other))))
                return replace(origin, foreign=foreign, rotated=origin.rotated or turned)
        return None


def flow_of(graph: fx.Graph) -> Flow:
    """Return the analysis of a graph, made once: graphs in a Program never change."""
    return remembered(graph, Flow, Flow)


def _all_tensors(node: fx.Node) -> bool:
    """Whether no operand of a sum is a number."""
    return op(node) in ("cat", "stack") or all(isinstance(a, fx.Node) for a in node.args[:2])


def _moved(node: fx.Node, source: Origin) -> Origin:
    name, value = op(node), node.args[0]
    assert isinstance(value, fx.Node)
    copies = source.copies
    if name == "expand" and len(shape(value)) == len(shape(node)):
        pairs = zip(shape(value)[1:], shape(node)[1:], strict=True)
        copies *= math.prod(new for old, new in pairs if old == 1 and isinstance(new, int))
    elif name == "repeat_interleave" and isinstance(node.args[1], int):
        copies *= node.args[1]
    features = source.features and source.features.after(name, node)
    return replace(source, features=features, copies=copies)


def _joined(operands: list[Origin]) -> Origin:
    """Return the origin of parts of one value put together again."""
    one = operands[0]
    spans = {o.features.span if o.features else None for o in operands}
    foreign = tuple(dict.fromkeys(node for o in operands for node in o.foreign))
    return replace(
        one,
        features=Features(spans.pop() if len(spans) == 1 else None, None),
        factor=one.factor if len({o.factor for o in operands}) == 1 else None,
        foreign=foreign,
        mixed=True,
        rotated=any(o.rotated for o in operands) or len(foreign) > 1,
    )
