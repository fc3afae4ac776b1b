"""What single nodes of a graph do, asked the way finders ask it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graphs import common_prefix, positions, remembered
from ..regions import local_path

_RESHAPES = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "transpose",
    "swapaxes", "permute", "movedim", "t", "unsqueeze", "squeeze", "expand", "expand_as",
    "repeat_interleave", "view_as_complex", "view_as_real",
}  # fmt: skip
_COPIES = {"contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "dropout"}
_PARTS = {"slice", "select", "narrow"}
SPLITS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
_SHIFTS = {"roll", "pad", "constant_pad_nd"}  # how windows of tokens are cut
LAYERS = frozenset({"linear", "quantized_linear", "int8_linear", "hash_linear"})
LAYOUT = frozenset(_RESHAPES | _COPIES | _PARTS | SPLITS | {"getitem"})
CARRYING = LAYOUT | _SHIFTS
_OPS: dict[int, tuple[str, tuple[str, ...], Any]] = {}  # by id: ops hash slowly, but stay alive


def op(node: fx.Node) -> str:
    """Name what a node calls, without namespace and overload; empty for everything else."""
    if node.op != "call_function":
        return ""
    try:
        return _OPS[id(node.target)][0]
    except KeyError:
        return _op(node.target)[0]


def _op(target: Any) -> tuple[str, tuple[str, ...], Any]:
    """Return an op's name, the names of its arguments, and the op; looked up once."""
    schema = getattr(target, "_schema", None)
    name = schema.name if schema is not None else target.__name__
    names = tuple(argument.name for argument in schema.arguments) if schema is not None else ()
    return _OPS.setdefault(id(target), (str(name).rpartition("::")[2], names, target))


def calls_to(graph: fx.Graph, names: Iterable[str]) -> list[fx.Node]:
    """Return the nodes that call ops of these names, in order."""
    table = remembered(graph, "calls by op", _by_op)
    found = [node for name in names for node in table.get(name, ())]
    return sorted(found, key=positions(graph).__getitem__)


def _by_op(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        found.setdefault(op(node), []).append(node)
    return found


def calls_any(node: Any, *targets: object) -> bool:
    """Whether something is a node that calls one of these ops."""
    return isinstance(node, fx.Node) and node.target in targets


def is_layer(node: fx.Node) -> bool:
    """Whether a node is a layer over stored weights: dense, quantized, or tables read by hash."""
    if op(node) not in LAYERS:
        return False
    weights = [a for a in node.args[1:] if isinstance(a, fx.Node)]
    return all(weight.op == "get_attr" for weight in weights)


def peel(node: fx.Node, through: frozenset[str] = LAYOUT) -> fx.Node:
    """Return the value that is only laid out differently in `node`."""
    while op(node) in through and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value, those that only ask for its shape or type left out."""
    return [
        user
        for user in node.users
        if not op(user).startswith("sym_")
        and not (op(user) in ("type_as", "view_as", "expand_as") and user.args[0] is not node)
    ]


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return a value's shape, dynamic sizes as symbols."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def joint_path(nodes: Iterable[fx.Node]) -> str:
    """`mlp.up` and `mlp.down` give `mlp`; `up` and `down`, which share no module, `up_down`."""
    paths = list(dict.fromkeys(filter(None, map(local_path, nodes))))
    return common_prefix(paths) or "_".join(path.replace(".", "_") for path in paths)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, those left out left out."""
    _, names, _ = _OPS.get(id(node.target)) or _op(node.target)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
