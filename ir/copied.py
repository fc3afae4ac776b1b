"""Copy what torch has traced, and its branches, into graphs of a Program."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from .branches import begin, choose, free_keys, is_cond, without_unread
from .errors import CaptureError
from .graphs import module_path, remove_dead, skip_noise


def copy_computation(
    owner: fx.GraphModule,
    graph: fx.Graph,
    env: dict[fx.Node, Any],
    graphs: dict[str, fx.Graph],
    key: str,
) -> None:
    """Copy what computes, without noise; regions under `no_grad` or autocast-off are inlined.

    Args:
        owner: What is copied.
        graph: Where to.
        env: What stands for each node; filled here.
        graphs: Where branches are added.
        key: Of `graph` among them.
    """
    for node in owner.graph.nodes:
        if node.op != "call_function":
            continue
        passed_on, region = skip_noise(node), wrapped(node)
        if passed_on is not None:
            env[node] = env[passed_on]
        elif region is not None:
            inner = getattr(owner, str(region.target))
            taken = node.args[node.args.index(region) + 1 :]
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            env.update({p: env[a] for p, a in zip(places, taken, strict=True)})
            copy_computation(inner, graph, env, graphs, key)
            results = inner.graph.output_node().args[0]
            env[node] = [env[result] for result in results]
        elif is_cond(node):
            given = [env[o] if isinstance(o, fx.Node) else o for o in node.args[3]]
            keys, operands = branch_off(owner, node, given, graphs, key)
            env[node] = choose(graph, env[node.args[0]], keys, operands, node.meta["val"])
            env[node].meta = {**node.meta, **env[node].meta}
        elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)


def branch_off(
    owner: fx.GraphModule,
    node: fx.Node,
    given: Sequence[Any],
    graphs: dict[str, fx.Graph],
    key: str,
) -> tuple[tuple[str, str], tuple[fx.Node, ...]]:
    """Add the two branches of a choice as torch has it, submodules, to the graphs of a Program.

    Args:
        owner: Holds the submodules.
        node: The choice.
        given: What stands for its operands in the graph that will choose.
        graphs: Where branches are added.
        key: Of that graph among them.

    Returns:
        Keys of the branches, and the operands they take.
    """
    keys = free_keys(key, graphs)
    operands: tuple[fx.Node, ...] = ()
    for branch, module in zip(keys, node.args[1:3], strict=True):
        inner = getattr(owner, str(module.target))  # type: ignore[union-attr]
        graph = graphs[branch] = fx.Graph()
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        env, operands = begin(graph, places, given)
        _refuse_constants(inner)
        copy_computation(inner, graph, env, graphs, branch)
        results = inner.graph.output_node().args[0]
        graph.output(tuple(env[result] for result in results))
        _locate(graph)
        remove_dead(graph)
    return keys, without_unread([graphs[branch] for branch in keys], operands)


def wrapped(node: fx.Node) -> fx.Node | None:
    """Return the subgraph of a node that only sets a mode inference does not have."""
    name = getattr(node.target, "__name__", "")
    autocast_off = name == "wrap_with_autocast" and node.args[2] is False
    if name == "wrap_with_set_grad_enabled" or autocast_off:
        return next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    return None


def _refuse_constants(branch: fx.GraphModule) -> None:
    for node in branch.graph.nodes:
        modes = all(wrapped(user) or is_cond(user) for user in node.users)
        if node.op == "get_attr" and not modes:
            raise CaptureError(
                f"a branch of torch.cond makes a tensor of its own ({node.target}).",
                remedy="register it as a buffer of the module.",
            )


def _locate(branch: fx.Graph) -> None:
    """Say which module a node belongs to by the weight it reads: torch forgets it in branches."""
    for node in branch.nodes:
        weights = [n for n in node.all_input_nodes if n.op == "get_attr"]
        if weights and not module_path(node):
            path = str(weights[0].target).rpartition(".")[0]
            node.meta["nn_module_stack"] = {path: (path, "")}
