"""Single computations on the values of a model: what everything between two edges is.

A layer, a product of two values, an attention that is one op, a softmax, an activation, a norm, a
sum or product of values. Reshapes, masks and the like compute nothing and are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from torch import Tensor, fx

from ..graphs import positions
from ..ops.activations import ACTIVATIONS
from ..regions import Region, local_path, unique_paths
from .activation import activation_of
from .calls import op, readers
from .linear import Linear
from .norm import Norm

FORMS: Final = ("linear", "embedding", "convolution", "matmul", "attention", "softmax",
                "activation", "norm", "elementwise")  # fmt: skip

_BY_OP: Final[Mapping[str, str]] = {
    "linear": "linear",
    "embedding": "embedding",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "convolution"),
    **dict.fromkeys(("matmul", "bmm"), "matmul"),
    "scaled_dot_product_attention": "attention",
    **dict.fromkeys(("softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("add", "sub", "mul"), "elementwise"),
}
_MAKERS = {"linear", "embedding", "convolution", "attention"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation(Region):
    """One computation.

    Attributes:
        form: One of `FORMS`.
        function: Name of an activation, as in `ir.ops.activations`; empty for other forms.
        weights: The `get_attr` nodes of stored tensors that it reads as numbers.
        derived: Whether its values come from a layer of the same graph, not from inputs alone:
            tables of angles and masks do not.
        is_router: Whether its results choose experts.
    """

    form: str
    function: str = ""
    weights: tuple[fx.Node, ...] = ()
    derived: bool = True
    is_router: bool = False
    kind: ClassVar[str] = "operation"

    @property
    def node(self) -> fx.Node:
        """Its result."""
        return self.outputs[0]

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the operations of a graph, in order."""
        order = positions(graph)
        derived = _derived(graph)
        routers = {layer.nodes[0] for layer in Linear.find(graph) if layer.is_router}
        found = sorted(_found(graph), key=lambda parts: order[parts["nodes"][-1]])
        paths = unique_paths([local_path(parts["nodes"][-1]) for parts in found])
        return [
            cls(
                path=path,
                inputs=_sources(parts["nodes"], stored=False),
                outputs=parts["nodes"][-1:],
                weights=_sources(parts["nodes"], stored=True),
                derived=not derived.isdisjoint(_sources(parts["nodes"], stored=False)),
                is_router=parts["nodes"][-1] in routers,
                **parts,
            )
            for path, parts in zip(paths, found, strict=True)
        ]


def _found(graph: fx.Graph) -> Iterator[dict[str, Any]]:
    """Yield nodes and form of each operation; those of several nodes take theirs first."""
    taken: set[fx.Node] = set()
    for norm in Norm.find(graph):
        if norm.outputs == norm.nodes[-1:]:
            taken.update(norm.nodes)
            yield {"form": "norm", "nodes": norm.nodes}
    order = positions(graph)
    for node in reversed(graph.nodes):  # an activation is found at its end
        spelled = activation_of(node) if node not in taken else None
        if spelled and spelled.kind in ACTIVATIONS and _is_closed(spelled.nodes, node, taken):
            taken.update(spelled.nodes)
            nodes = tuple(sorted(spelled.nodes, key=order.__getitem__))
            yield {"form": "activation", "function": spelled.kind, "nodes": nodes}
    for node in graph.nodes:
        form = _BY_OP.get(op(node))
        if form and node not in taken and (form != "elementwise" or _is_of_values(node)):
            yield {"form": form, "nodes": (node,)}


def _is_closed(nodes: frozenset[fx.Node], last: fx.Node, taken: set[fx.Node]) -> bool:
    inner = nodes - {last}
    return taken.isdisjoint(nodes) and all(nodes.issuperset(readers(n)) for n in inner)


def _is_of_values(node: fx.Node) -> bool:
    """Whether two tensors of floating-point numbers meet."""
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    values = [n.meta.get("val") for n in (*operands, node)]
    return len(operands) == 2 and all(
        isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 0 for v in values
    )


def _sources(nodes: Iterable[fx.Node], *, stored: bool) -> tuple[fx.Node, ...]:
    """Return what nodes read of other nodes: stored tensors, or values."""
    inside = dict.fromkeys(nodes)
    sources = dict.fromkeys(s for node in inside for s in node.all_input_nodes)
    return tuple(s for s in sources if s not in inside and (s.op == "get_attr") == stored)


def _derived(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that some layer, or a block, had a part in."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        made = node.op == "call_module" or _BY_OP.get(op(node)) in _MAKERS
        if made or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
