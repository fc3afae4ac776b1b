"""Cut a piece out of a program: a smaller program that runs on its own.

    x -> block 0 -> block 1 -> block 2 -> y         cut at block 1:      h -> block 1 -> h'

A piece keeps the names of its blocks, nodes and tensors, so what is known of a place in the model
holds for the same place in the piece.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from .graphs import copy_graph, output_nodes, remove_dead
from .program import MAIN, Instance, Program
from .propagate import Values, describe_value
from .signature import Argument, Signature, TensorSpec
from .structure import Structure


def cut_instance(
    program: Program, name: str, values: Sequence[Any]
) -> tuple[Program, list[Tensor]]:
    """Return a program that calls one block instance and nothing else.

    Args:
        program: Where the instance is.
        name: The instance.
        values: What it is called with, one per placeholder of its class; sizes become constants.

    Returns:
        The program, and its inputs: the tensors among `values`.
    """
    instance = program.instances[name]
    block = copy_graph(program.graphs[instance.block])
    places = [node for node in block.nodes if node.op == "placeholder"]
    tensors = _bake(block, places, values)
    graph = fx.Graph()
    inputs = {graph.placeholder(place): tensor for place, tensor in tensors.items()}
    call = graph.call_module(name, tuple(inputs))
    count = range(len(output_nodes(block)))
    graph.output(tuple(graph.call_function(operator.getitem, (call, i)) for i in count))
    return _piece(
        program,
        {MAIN: graph, instance.block: block},
        {name: instance},
        {node.name: tensor for node, tensor in inputs.items()},
    )


def cut_nodes(
    program: Program,
    nodes: Sequence[fx.Node],
    values: dict[fx.Node, Any],
    outputs: Sequence[fx.Node],
) -> tuple[Program, list[Tensor]]:
    """Return a program of some nodes of the main graph, none of them a call of a block.

    Args:
        program: Where the nodes are.
        nodes: The nodes, in graph order.
        values: Values they read from outside, weights not counted; sizes become constants.
        outputs: What the program returns, among the nodes.

    Returns:
        The program, and its inputs: the tensors among `values`.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in values:
        env[node] = graph.placeholder(node.name)
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in env:
                env[source] = graph.node_copy(source)
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    inputs = _bake(graph, [env[node] for node in values], list(values.values()))
    return _piece(program, {MAIN: graph}, {}, inputs)


def prefix(program: Program, outputs: Sequence[fx.Node]) -> Program:
    """Return a flat program that stops as soon as some of its values are there.

    Args:
        program: A program without block instances; its inputs and dynamic sizes stay.
        outputs: What the shorter program returns.
    """
    mapping: dict[fx.Node, fx.Node] = {}
    graph = copy_graph(program.main, mapping)
    graph.output_node().args = (tuple(mapping[node] for node in outputs),)
    remove_dead(graph)
    signature = program.signature
    changed = Signature(
        arguments=signature.arguments,
        outputs=_tuple_of(len(outputs)),
        parameters=signature.parameters,
        ranges=signature.ranges,
        symbols=signature.symbols,
    )
    return _only_used(program.with_(graphs={MAIN: graph}, signature=changed, state=()))


def live_values(graph: fx.Graph, last: fx.Node) -> list[fx.Node]:
    """Return the values computed up to a node that later nodes read: tensors alone, in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    return [
        node
        for node in list(graph.nodes)[: order[last] + 1]
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and any(order[user] > order[last] for user in node.users)
    ]


def _bake(graph: fx.Graph, places: Sequence[fx.Node], values: Sequence[Any]) -> dict[str, Tensor]:
    """Write sizes and other plain values into the graph; return the tensors that stay inputs."""
    inputs: dict[str, Tensor] = {}
    for node, value in zip(places, values, strict=True):
        if isinstance(value, Tensor):
            inputs[node.name] = value.detach()
            continue
        for user in list(node.users):
            _write(user, node, value)
        graph.erase_node(node)
    return inputs


def _write(user: fx.Node, place: fx.Node, value: Any) -> None:
    """Put a constant where a node reads another."""

    def constant(node: fx.Node) -> Any:
        return value if node is place else node

    user.args = fx.node.map_arg(user.args, constant)
    user.kwargs = fx.node.map_arg(user.kwargs, constant)


def _piece(
    program: Program,
    graphs: dict[str, fx.Graph],
    instances: dict[str, Instance],
    inputs: dict[str, Tensor],
) -> tuple[Program, list[Tensor]]:
    """Assemble a program and give its nodes the shapes of its inputs."""
    leaf = Structure("leaf")
    arguments = tuple(
        Argument(name, True, leaf, (TensorSpec(name, value.dtype, tuple(value.shape)),))
        for name, value in inputs.items()
    )
    signature = Signature(
        arguments, _tuple_of(len(output_nodes(graphs[MAIN]))), parameters=tuple(inputs)
    )
    piece = program.with_(
        graphs=graphs, instances=instances, signature=signature, state=(), notes=()
    )
    piece = _only_used(piece)
    Values({}).fill(piece, {name: describe_value(value) for name, value in inputs.items()})
    return piece, list(inputs.values())


def _only_used(program: Program) -> Program:
    """Drop the tensors that nothing reads."""
    unused = program.unused_tensors()
    return program.with_(
        tensors={name: t for name, t in program.tensors.items() if name not in unused},
        parameters=program.parameters - unused,
        aliases={alias: name for alias, name in program.aliases.items() if name not in unused},
    )


def _tuple_of(count: int) -> Structure:
    return Structure("tuple", (), (Structure("leaf"),) * count)
