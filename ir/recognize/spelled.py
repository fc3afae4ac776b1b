"""Things PyTorch has one op for, spelled out in several.

A model may write attention as two matrix products around a softmax, repeat key and value heads by
hand, or multiply with a transposed weight. Finding them is the first half of canonicalizing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from ..graphs import aten, positions
from ..program import Program
from ..regions import Region, find_once, local_path, unique_paths
from .activation import Activation, activation_of
from .attention import Attention
from .calls import calls_any, op, shape
from .core import Core, cores_of
from .layer import Layer
from .repeated import repeated

_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransposedLinear(Region):
    """A product with a weight, as `addmm(bias, x, w)` or `x @ w.T + bias`, views around included.

    Attributes:
        weight_node: The `get_attr` node of the weight.
        bias_node: The one of the bias, or None.
        turned: Whether the weight is stored as [in_features, out_features].
    """

    weight_node: fx.Node
    bias_node: fx.Node | None
    turned: bool
    kind: ClassVar[str] = "transposed linear"

    @property
    def gap(self) -> str:
        """Why its weight cannot be turned round; empty when it can, or need not be."""
        shared = self.turned and self.is_shared(self.weight_node)
        return "reads a weight that others read as it is stored" if shared else ""

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        weight = self.tensor(self.weight_node)
        return weight.t().contiguous() if self.turned else weight

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return None if self.bias_node is None else self.tensor(self.bias_node)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every product of a value and a parameter."""
        found = [parts for node in graph.nodes if (parts := _addmm(node) or _product(node))]
        paths = unique_paths([local_path(parts["outputs"][0]) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpelledActivation(Region):
    """An activation written as products and powers, where there is a shorter way.

    Attributes:
        form: What it is: `silu`, `gelu`, `gelu_tanh`, or `quick_gelu`, for which PyTorch has no op:
            its shortest spelling is `x * sigmoid(x * 1.702)`.
    """

    form: str
    kind: ClassVar[str] = "spelled activation"
    forms: ClassVar[frozenset[str]] = frozenset({"silu", "gelu", "gelu_tanh", "quick_gelu"})

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return activations that are not in their shortest spelling."""
        order = positions(graph)
        found = [match for node in graph.nodes if (match := activation_of(node))]
        found = [m for m in found if len(m.nodes) > 1 and m.kind in cls.forms]
        found = [m for m in found if m.kind != "quick_gelu" or not _is_short(m)]
        found = [m for m in found if all(m.nodes.issuperset(n.users) for n in m.nodes - {m.result})]
        paths = unique_paths([local_path(match.result) for match in found])
        return [
            cls(
                path=path,
                nodes=tuple(sorted(match.nodes, key=order.__getitem__)),
                inputs=(match.source,),
                outputs=(match.result,),
                form=match.kind,
            )
            for path, match in zip(paths, found, strict=True)
        ]


def _is_short(activation: Activation) -> bool:
    """Whether a quick GELU is `x * sigmoid(x * 1.702)`, operands in this order."""
    x, result = activation.source, activation.result
    if op(result) != "mul" or result.args[0] is not x:
        return False
    inner: Any = result.args[1].args[0]  # type: ignore[union-attr]
    return inner.args[0] is x


@dataclass(frozen=True, kw_only=True, eq=False)
class SpelledAttention(Region):
    """`softmax(q @ k.T * scale + mask) @ v`, the inputs being q, k, v and the masks.

    Attributes:
        core: What it is made of.
        gap: Why no attention op computes it, completing "the region ..."; empty when one does.
    """

    core: Core
    gap: str
    kind: ClassVar[str] = "spelled attention"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the attentions of several nodes."""
        order = positions(graph)
        found = [_before_repeating(core) for core in cores_of(graph) if core.spelled]
        paths = unique_paths([local_path(core.node) for core in found])
        return [
            cls(
                path=path,
                nodes=tuple(sorted(core.nodes, key=order.__getitem__)),
                inputs=(core.query, core.key, core.value, *(term.node for term in core.terms)),
                outputs=(core.node,),
                core=core,
                gap=core.gap or _gap(core),
            )
            for path, core in zip(paths, found, strict=True)
        ]


def _before_repeating(core: Core) -> Core:
    """Return an attention over key and value heads as they were before they were repeated."""
    key, value = repeated(core.key), repeated(core.value)
    if core.orders or key is None or value is None:
        return core
    nodes = core.nodes.union(core.key.users, key[0], value[0])  # one of them turns the keys
    if any(not nodes.issuperset(n.users) for n in nodes - {core.node}):
        return core
    return replace(core, key=key[1], value=value[1], nodes=nodes)


def _gap(core: Core) -> str:
    """Say what the op cannot take of an attention that is otherwise one."""
    sides = (core.query, core.key, core.value, core.node)
    if len({side.meta["val"].dtype for side in sides}) > 1:
        return "computes in another type than it reads"
    adds = [term.node.meta["val"].dtype for term in core.terms if term.form == "add"]
    if any(dtype != core.query.meta["val"].dtype for dtype in adds):
        return "adds a mask of another type"
    if any(term.form != "add" and term.value > LOWEST / 2 for term in core.terms):
        return "hides scores behind a number that is not the lowest"
    if any(term.node.meta["val"].dim() < 2 for term in core.terms):
        return "has a mask of less than two axes"
    return _gap_inside(core)


def _gap_inside(core: Core) -> str:
    """Say what the op cannot take of the nodes between queries and result."""
    read = core.query.meta["val"].dtype
    values = [n.meta["val"] for n in core.nodes if isinstance(n.meta["val"], Tensor)]
    types = {value.dtype for value in values if value.dtype.is_floating_point}
    if any(torch.finfo(dtype).eps > torch.finfo(read).eps for dtype in types):
        return "computes in a narrower type than it reads"
    products = [shape(n) for n in core.nodes if op(n) in _PRODUCTS and n is not core.node]
    softmaxes = [shape(n) for n in core.nodes if op(n) in ("softmax", "_softmax")]
    before, after = ({tuple(sorted(map(str, s))) for s in found} for found in (products, softmaxes))
    if before != after:
        return "has a mask with axes that its scores do not have"
    heads, kv_heads = (shape(side)[-3] for side in (core.query, core.key))
    grouped = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    if not core.orders and len(shape(core.query)) == 4 and not grouped:
        return "has fewer heads of queries than of keys"
    return ""


_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


LOWEST = -(2.0 - 2.0**-23) * 2.0**127  # of float32


def _addmm(node: Any) -> dict[str, Any] | None:
    """Match `addmm` over parameters."""
    if node.target is not aten.addmm.default or node.kwargs:
        return None
    bias, x, weight = node.args
    if not bias.op == weight.op == "get_attr":
        return None
    nodes, source = _with_views(node, x)
    return {
        "nodes": nodes,
        "inputs": (source,),
        "outputs": nodes[-1:],
        "weight_node": weight,
        "bias_node": bias,
        "turned": True,
    }


def _product(node: Any) -> dict[str, Any] | None:
    """Match `x @ w` or `x @ w.T`, and the bias added to it."""
    if node.target not in (aten.matmul.default, aten.mm.default):
        return None
    x, weight = node.args
    turned = weight.op == "get_attr"
    if _turns(weight):
        weight = weight.args[0]
    if weight.op != "get_attr" or weight.meta["val"].dim() != 2 or x.meta["val"].dim() < 2:
        return None
    last = next(iter(node.users)) if len(node.users) == 1 else node
    others = [n for n in last.all_input_nodes if n is not node]
    width = (node.meta["val"].shape[-1],)
    biased = calls_any(last, aten.add.Tensor) and not last.kwargs and len(others) == 1
    biased = biased and others[0].op == "get_attr" and tuple(others[0].meta["val"].shape) == width
    nodes = (node, last) if biased else (node,)
    return {
        "nodes": nodes,
        "inputs": (x,),
        "outputs": nodes[-1:],
        "weight_node": weight,
        "bias_node": others[0] if biased else None,
        "turned": turned,
    }


def _turns(node: fx.Node) -> bool:
    """Whether a node exchanges the axes of a matrix."""
    axes: Any = node.args[1:]
    if op(node) == "transpose":
        return {axis % 2 for axis in axes} == {0, 1}
    if op(node) == "permute":
        return [axis % 2 for axis in axes[0]] == [1, 0]
    return op(node) in ("t", "numpy_T", "mT")


def _with_views(node: Any, x: Any) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """Return an `addmm` with the views that flatten and restore leading axes, and what it reads."""
    (user, *others) = node.users or (None,)
    if others or user is None or user.target not in _VIEWS or x.target not in _VIEWS:
        return (node,), x
    source = x.args[0]
    before, after = source.meta["val"], user.meta["val"]
    leading = [tuple(map(str, value.shape[:-1])) for value in (before, after)]
    same = leading[0] == leading[1] and before.shape[-1] == x.meta["val"].shape[-1]
    if not same or after.shape[-1] != node.meta["val"].shape[-1] or len(x.users) > 1:
        return (node,), x
    return (x, node, user), source


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedOutput(Region):
    """One linear layer that reads an attention's heads and something else side by side.

    The inputs are what it reads, in order.

    Attributes:
        layer: The layer.
        widths: Width of each input.
    """

    layer: Layer
    widths: tuple[int, ...]
    kind: ClassVar[str] = "shared output"

    @property
    def gap(self) -> str:
        """Why it cannot be cut in two; empty when it can."""
        weight = self.layer.weight_node
        shared = weight is not None and self.is_shared(weight)
        return "reads a weight that others read whole" if shared else ""

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the layers of which an attention has a share of the columns."""
        streams = [stream for region in find_once(graph, Attention) for stream in region.streams]
        shares = [s.output.node for s in streams if s.output and s.output.columns]
        layers = [Layer.of(node, Layer.all_features(node)) for node in dict.fromkeys(shares)]
        return [cls._of(layer) for layer in layers if layer.is_dense]

    @classmethod
    def _of(cls, layer: Layer) -> Self:
        cat = layer.inputs[0]
        parts = tuple(cat.all_input_nodes)
        return cls(
            path=layer.path,
            nodes=(cat, layer.node),
            inputs=parts,
            outputs=(layer.node,),
            layer=layer,
            widths=tuple(int(part.meta["val"].shape[-1]) for part in parts),
        )

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        bound.__dict__["layer"] = self.layer.bind(program, graph, instance)
        return bound
