"""The way from a residual stream into a sublayer: a norm, and its modulation.

sublayer(norm(x) * (1 + scale) + shift)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from .calls import CARRYING, op, readers
from .flow import Flow
from .norm import Norm

LONGEST = 32  # nodes looked at on either side of a sublayer
Before = Mapping[fx.Node, fx.Node | None]


class Behind(Mapping[fx.Node, fx.Node | None]):
    """What values may be modulations of, each with the node that reads it; nearest nodes first.

    Only as much of it is looked at as is asked for.
    """

    def __init__(self, flow: Flow, values: tuple[fx.Node, ...]) -> None:
        self._flow = flow
        self._found: dict[fx.Node, fx.Node | None] = dict.fromkeys(values)
        self._pending = list(self._found)
        self._next = 0

    def __contains__(self, node: object) -> bool:
        while node not in self._found:
            if not self._further():
                return False
        return True

    def __getitem__(self, node: fx.Node) -> fx.Node | None:
        if node not in self:
            raise KeyError(node)
        return self._found[node]

    def __iter__(self) -> Iterator[fx.Node]:
        index = 0
        while index < len(self._pending) or self._further():
            if index < len(self._pending):
                yield self._pending[index]
                index += 1

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _further(self) -> bool:
        """Look behind the nearest node that is left; return whether there was one."""
        if self._next == len(self._pending) or len(self._found) > LONGEST:
            return False
        node = self._pending[self._next]
        self._next += 1
        for source in _sources(self._flow, node):
            if source not in self._found and source.op != "get_attr":
                self._found[source] = node
                self._pending.append(source)
        return True


def _sources(flow: Flow, node: fx.Node) -> Sequence[fx.Node]:
    """Return what a value may be a modulation of, one step back."""
    norm, name = flow.norm_to.get(node), op(node)
    if norm is not None:
        return norm.inputs
    if name in CARRYING or name == "batch_norm":
        return node.all_input_nodes[:1]
    return node.all_input_nodes if name in ("mul", "add", "div", "addcmul", "cat") else ()


Entry = tuple[set[fx.Node], Norm | None, fx.Node | None, fx.Node | None]


def entry_of(flow: Flow, stream: fx.Node, before: Before) -> Entry:
    """Return the nodes between stream and sublayer, and norm, scale and shift among them."""
    nodes: set[fx.Node] = set()
    norm = scale = shift = None
    value, step = stream, before[stream]
    while step is not None:
        nodes.add(step)
        others = [n for n in step.all_input_nodes if n is not value]
        if step in flow.norm_to:
            norm = flow.norm_to[step]
            nodes.update(norm.nodes)
        elif op(step) == "addcmul" and len(others) == 2:
            shift, scale = others
        elif op(step) == "mul" and others and not weighs(flow, norm, value, others[0]):
            scale = others[0]
        elif op(step) == "add" and others:
            shift = others[0]
        value, step = step, before[step]
    return nodes, norm, scale, shift


def weighs(flow: Flow, norm: Norm | None, value: fx.Node, factor: fx.Node) -> bool:
    """Whether a factor is the weight of the norm it follows, computed as in `1 + weight`."""
    follows = norm is not None and norm.outputs[0] is value and norm.weight_node is None
    return follows and not flow.reads[factor]


def only_norm(flow: Flow, value: fx.Node) -> Norm | None:
    """Return the norm that is the only reader of a value."""
    norm = flow.norm_from.get(value)
    return norm if norm is not None and set(norm.nodes).issuperset(readers(value)) else None
