"""What every finder asks of a graph: order, norms, origins, and what depends on what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ..graphs import is_mutable, positions, remembered
from ..regions import find_once
from .calls import LAYERS, op
from .norm import Norm
from .origin import Origins
from .written import written_of


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


class Flow:
    """Order, norms and origins of one graph.

    Attributes:
        position: Place of each node in the graph.
        norms: The norms.
        norm_to: Norm by its result.
        norm_from: Norm by what it reads.
        ways: What `residual_of` found, by result and inputs of a sublayer.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = positions(graph)
        self.norms = find_once(graph, Norm)
        self.norm_to = {norm.outputs[0]: norm for norm in self.norms}
        self.norm_from = {norm.inputs[0]: norm for norm in self.norms}
        self.ways: dict[Any, Any] = {}

    @cached_property
    def origins(self) -> Origins:
        """Origin of every node."""
        return Origins(self.graph, self.norm_to)

    def is_projected(self, anchor: fx.Node) -> bool:
        """Whether an anchor is a linear layer, or joins the results of several."""
        return anchor in self.origins.projected

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

    def enclose(self, core: set[fx.Node], *results: fx.Node) -> dict[str, Any]:
        """Return nodes, inputs and outputs of the region around `core`, `results` first.

        A replacement stands behind all the region reads. What the core reads and is computed only
        after something outside has read a value of the region belongs to it as well.
        """
        nodes = _with_picks(core)
        first = len(self.position)
        while True:
            ordered = sorted(nodes, key=self.position.__getitem__)
            read = dict.fromkeys(
                n for node in ordered for n in node.all_input_nodes if n not in nodes
            )
            seen = [node for node in ordered if not nodes.issuperset(node.users)]
            readers = (n for node in seen for n in node.users if n not in nodes)
            first = min((self.position[n] for n in readers), default=first)
            late = {n for n in read if self.position[n] >= first and _is_free(n)}
            if not late:
                break
            nodes |= _with_picks(late)
        return {
            "nodes": tuple(ordered),
            "inputs": tuple(n for n in read if n.op != "get_attr"),
            "outputs": (*results, *(n for n in seen if n not in results)),
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
            written = written_of(node) if op(node) == "slice_scatter" else None
            if written is not None:
                nodes |= written.nodes
                pending += written.pieces
                continue
            norm = self.norm_to.get(node)
            pending += [norm.inputs[0]] if norm else node.all_input_nodes
            nodes.update(norm.nodes if norm else ())
        return nodes


def flow_of(graph: fx.Graph) -> Flow:
    """Return the analysis of a graph, made once: graphs in a Program never change."""
    return remembered(graph, Flow, Flow)


def _with_picks(nodes: set[fx.Node]) -> set[fx.Node]:
    """Return nodes with the parts that are picked of their results."""
    return {*nodes, *(n for node in nodes for n in node.users if op(n) == "getitem")}


def _is_free(node: fx.Node) -> bool:
    """Whether a node may be computed later than it is."""
    return node.op == "call_function" and not is_mutable(node)
