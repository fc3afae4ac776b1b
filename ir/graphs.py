"""Small, linear-time operations on FX graphs that have no owner."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

aten = torch.ops.aten
T = TypeVar("T")

_ASSERTIONS = {
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async",
    "sym_constrain_range", "sym_constrain_range_for_size", "_guards_fn",
}  # fmt: skip
_IDENTITIES = {"alias", "detach", "detach_", "lift_fresh_copy"}


def copy_graph(graph: fx.Graph, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.Graph:
    """Return an editable copy. `mapping` is filled with the copy of each node."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {} if mapping is None else mapping
    for node in graph.nodes:
        env[node] = copy.node_copy(node, env.__getitem__)
    return copy


def remembered(graph: fx.Graph, what: Any, make: Callable[[fx.Graph], T]) -> T:
    """Return what `make` finds in a graph, finding it once.

    Graphs in a Program never change. What is known of one lives and dies with it, and a copy
    starts knowing nothing.
    """
    known: dict[Any, Any] = graph.__dict__.setdefault("_remembered", {})
    if what not in known:
        with collected_later():
            known[what] = make(graph)
    return known[what]


@contextlib.contextmanager
def collected_later() -> Iterator[None]:
    """Put off garbage collection, which looks at every node again and again and frees none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the place of each node in its graph, counted once per graph."""
    return remembered(graph, "positions", lambda g: {n: i for i, n in enumerate(g.nodes)})


def block_calls(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the calls of block instances by name, in order."""

    def find(graph: fx.Graph) -> dict[str, fx.Node]:
        return {str(node.target): node for node in graph.nodes if node.op == "call_module"}

    return remembered(graph, "calls", find)


def argument_positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the position of each placeholder among a graph's arguments."""

    def find(graph: fx.Graph) -> dict[fx.Node, int]:
        given = (node for node in graph.nodes if node.op == "placeholder")
        return {node: index for index, node in enumerate(given)}

    return remembered(graph, "arguments", find)


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes a graph returns, in order."""
    (result,) = graph.output_node().args
    flat = result if isinstance(result, tuple | list) else (result,)
    return [node for node in flat if isinstance(node, fx.Node)]


def remove_dead(graph: fx.Graph) -> int:
    """Erase nodes nobody reads, in one backward sweep; return how many."""
    erased = 0
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr", "call_module") and not node.users:
            if not is_mutable(node):
                graph.erase_node(node)
                erased += 1
    return erased


def is_mutable(node: fx.Node) -> bool:
    """Say whether the node writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def skip_noise(node: fx.Node) -> fx.Node | None:
    """Return the argument a node merely passes on, or None when it computes something.

    Assertions have no users, so returning their argument drops them.
    """
    overload = node.target
    if node.op != "call_function" or not isinstance(overload, torch._ops.OpOverload):
        return None
    name = overload._schema.name.partition("::")[2]
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or name in _IDENTITIES or name in _ASSERTIONS:
        return source
    if name in ("dropout", "feature_dropout") and (not node.args[2] or node.args[1] == 0):
        return source
    if name == "to" and _same_kind(source, node) and not _copies(node):
        return source
    if name == "squeeze" and source.meta["val"].dim() == node.meta["val"].dim():
        return source  # no axis was of length one
    return None


def place_of(tensor: Tensor) -> object:
    """Say where a tensor lies and how: equal for tied tensors, unique for one without memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def module_path(node: fx.Node) -> str:
    """Return the path of the module a node came from, `""` for the root."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def common_prefix(paths: Iterable[str]) -> str:
    """Return the longest module path that all paths start with."""
    split = [path.split(".") for path in dict.fromkeys(paths)]
    if not split:
        return ""
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _same_kind(source: fx.Node, node: fx.Node) -> bool:
    old, new = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)
    )


def _copies(node: fx.Node) -> bool:
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given.get("copy")) or given.get("memory_format") is not None
