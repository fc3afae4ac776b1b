"""What is plain enough to be called by its place.

Between an input and the blocks stands an embedding, behind them a head: that says where a part is,
not that it is understood. It is when it holds nothing but layers, a few in a chain, and what lays
out, scales, normalises and pools their results. Products of two activations, sums with what a
value was made of, and recurrences are the work of blocks; a part that has them is a block that was
not recognised, and the first such node says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..graphs import remembered
from .calls import CARRYING, LAYERS, is_layer, op, readers
from .convolution import CONVOLUTIONS
from .flow import Flow, NotRecognized, flow_of
from .path import nodes_between

HANDFUL = 4  # layers in a chain
PRODUCTS = frozenset({"matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"})
_RECURRENCES = {"cumsum", "cumprod", "scan", "lstm", "gru"}
_BUSY = LAYERS | CONVOLUTIONS | PRODUCTS | _RECURRENCES
_TABLES = {"embedding", "quantized_embedding"}
_SUMMARIES = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm",
    "argmax", "glu", "index", "index_select", "gather", "one_hot", "any", "all",
}  # fmt: skip
_ARRANGED = {"cat", "stack", "pixel_shuffle", "pixel_unshuffle", "repeat", "meshgrid", "im2col"}
_CREATED = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_full"}
_KNOWN = CARRYING | _SUMMARIES | _ARRANGED | _CREATED | _TABLES


def works(node: fx.Node) -> bool:
    """Whether a node is one of those that a part exists for: it mixes channels or positions."""
    name = op(node)
    return name in _BUSY or "conv" in name or "pool" in name or "fft" in name


def oddity_of(
    nodes: Sequence[fx.Node],
    role: str,
    *,
    is_class: bool,
    calls: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    streams: Set[fx.Node] = frozenset(),
    may_add: bool = False,
    longest: int = HANDFUL,
) -> NotRecognized | None:
    """Return the first node that a part of a role does not hold; None if there is none.

    Args:
        nodes: The part, in graph order.
        role: What it would be.
        is_class: Whether its graph is that of a class of blocks: given activations, not inputs.
        calls: What the calls among its nodes compute.
        streams: What is made of streams of blocks, which may not be added to each other.
        may_add: Whether it may add to a value what layers made of the value.
        longest: Layers in a chain, at most.
    """
    return _Part(role, is_class, calls or {}, streams, may_add, longest).look(nodes)[0]


@dataclass(frozen=True)
class _Part:
    """What a part would be, and what it may hold."""

    role: str
    is_class: bool
    calls: Mapping[fx.Node, Sequence[fx.Node]]
    streams: Set[fx.Node]
    may_add: bool
    longest: int

    def look(self, nodes: Sequence[fx.Node]) -> tuple[NotRecognized | None, int]:
        """Return the first odd node, and the layers of the longest chain."""
        if not nodes:
            return None, 0
        flow = flow_of(nodes[0].graph)
        norms = remembered(flow.graph, "nodes of norms", _nodes_of_norms)
        chain: dict[fx.Node, int] = {}
        for node in nodes:
            longest = max((chain.get(source, 0) for source in node.all_input_nodes), default=0)
            reason = ""
            if node in self.calls:
                odd, more = replace(self, is_class=True, calls={}).look(self.calls[node])
                if odd is not None:
                    return odd, 0
                longest += more
            elif self._is_activation(flow, node) and node not in norms:
                longest += works(node) and len(node.all_input_nodes) > 1
                reason = self._product(flow, node) or _reason(node, self.role)
                reason = reason or self._sum(flow, node)
            if longest > self.longest:
                reason = f"is layer {longest} in a chain, more than are understood as {self.role}"
            if reason:
                return NotRecognized(self.role, node, reason), 0
            chain[node] = longest
        return None, max(chain.values())

    def _is_activation(self, flow: Flow, node: fx.Node) -> bool:
        """Whether layers made a value; in a class, whether it is made of an argument."""
        return bool(flow.reads[node]) if self.is_class else node in flow.learned

    def _product(self, flow: Flow, node: fx.Node) -> str:
        """Say that a node is a product of two activations; empty if it is none."""
        operands = node.all_input_nodes if op(node) in PRODUCTS else []
        several = sum(self._is_activation(flow, operand) for operand in operands) > 1
        return "multiplies two activations outside of an attention" if several else ""

    def _sum(self, flow: Flow, node: fx.Node) -> str:
        """Say that a node adds layers of a value to it, or two streams; empty if it does not."""
        operands = node.all_input_nodes if op(node) in ("add", "sub") else []
        if len(operands) != 2 or self.may_add:
            return ""
        if all(n in self.streams for n in operands):
            return "adds two values that are made of streams"
        start, end = sorted(operands, key=flow.position.__getitem__)
        way = nodes_between(flow, start, end)
        return "adds what layers made of a value to the value" if any(map(works, way)) else ""


def _nodes_of_norms(graph: fx.Graph) -> set[fx.Node]:
    return {node for norm in flow_of(graph).norms for node in norm.nodes}


def _reason(node: fx.Node, role: str) -> str:
    """Say what an op does that no plain part does; empty for a plain one."""
    name = op(node)
    if name in ("softmax", "_softmax", "log_softmax"):
        ends = all(user.op == "output" for user in readers(node))
        return "" if ends else "is a softmax outside of an attention"
    if not name or not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return ""
    plain = name in _KNOWN or torch.Tag.pointwise in getattr(node.target, "tags", ())
    if plain or is_layer(node) or (works(node) and name not in _RECURRENCES):
        return ""
    if "norm" in name or "upsample" in name:
        return ""
    return f"is a {name}, which is not understood as {role}"
