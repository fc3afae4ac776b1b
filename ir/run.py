"""Run a program node by node: the reference every engine is measured against.

Slow and simple. It can compute in another precision, which gives the fp64 reference of a
certificate, and it can show the outputs of each block as they appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .graphs import output_nodes
from .program import MAIN, Program
from .regions import Region

Observer = Callable[[str, Sequence[Any]], None]
NodeObserver = Callable[[str | None, fx.Node, Any], None]
Replaced = Sequence[tuple[Region, Callable[..., Any]]]


def run(
    program: Program,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    on_block: Observer | None = None,
    on_node: NodeObserver | None = None,
    instead: Replaced = (),
) -> list[Any]:
    """Run the program on flat inputs.

    Args:
        program: What to run.
        inputs: Tensors for the placeholders of `main`, state included.
        dtype: Compute floating-point values in this type; None keeps each as it is.
        on_block: Called with an instance's name and outputs after it ran.
        on_node: Called with (instance or None, node, value) after each node.
        instead: Regions of the program, and what is called in the place of each.

    Returns:
        The flat outputs of `main`.
    """
    with torch.no_grad():
        return _Runner(program, dtype, on_block, on_node, instead).run(inputs)


def run_nodes(
    program: Program,
    nodes: Sequence[fx.Node],
    known: Mapping[fx.Node, Any],
    instance: str | None,
    dtype: torch.dtype | None = None,
) -> dict[fx.Node, Any]:
    """Run part of a graph on known values; weights are looked up as needed.

    Returns:
        The known values, the weights read, and the value of each node.
    """
    runner = _Runner(program, dtype, None, None)
    env = dict(known)
    with torch.no_grad():
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in env:
                    env[source] = runner.node(source, env, iter(()), instance)
            env[node] = runner.node(node, env, iter(()), instance)
    return env


class _Runner:
    def __init__(
        self,
        program: Program,
        dtype: torch.dtype | None,
        on_block: Observer | None,
        on_node: NodeObserver | None,
        instead: Replaced = (),
    ) -> None:
        self.program, self.dtype = program, dtype
        self.on_block, self.on_node = on_block, on_node
        self.instead = {(r.instance, node): (r, call) for r, call in instead for node in r.nodes}
        self.awaited = {node for region, _ in instead for node in region.inputs}
        self.last_use: dict[str, dict[fx.Node, list[fx.Node]]] = {}

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        self.last_use = {key: _last_uses(graph) for key, graph in self.program.graphs.items()}
        return self._graph(MAIN, None, list(map(self._convert, inputs)))

    def _graph(self, key: str, instance: str | None, inputs: Sequence[Any]) -> list[Any]:
        graph, frees = self.program.graphs[key], self.last_use[key]
        given: Iterator[Any] = iter(inputs)
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "output":
                break
            if (instance, node) in self.instead:
                self._replace(*self.instead[instance, node], env)
            else:
                env[node] = self.node(node, env, given, instance)
            if self.on_node is not None and node in env:
                self.on_node(instance, node, env[node])
            for dead in frees.get(node, ()):
                if dead not in self.awaited:
                    env.pop(dead, None)
        return [env[node] for node in output_nodes(graph)]

    def node(
        self, node: fx.Node, env: dict[fx.Node, Any], given: Iterator[Any], instance: str | None
    ) -> Any:
        if node.op == "placeholder":
            return next(given)
        if node.op == "get_attr":
            return self._convert(self.program.weight(str(node.target), instance))
        args = fx.node.map_arg(node.args, env.__getitem__)
        if node.op == "call_module":
            name = str(node.target)
            outputs = self._graph(self.program.instances[name].block, name, args)
            if self.on_block is not None:
                self.on_block(name, outputs)
            return outputs
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        if self.dtype is not None:
            args, kwargs = _retype(args, self.dtype), _retype(kwargs, self.dtype)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _replace(self, region: Region, call: Callable[..., Any], env: dict[fx.Node, Any]) -> None:
        """Compute a region's outputs another way, as soon as its inputs are known."""
        if region.outputs[0] in env or not all(node in env for node in region.inputs):
            return
        result = call(*(env[node] for node in region.inputs))
        several = isinstance(result, tuple | list)
        env.update(zip(region.outputs, result if several else (result,), strict=True))

    def _convert(self, value: Any) -> Any:
        if self.dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value


def _retype(value: Any, dtype: torch.dtype) -> Any:
    """Replace floating-point dtypes among literal arguments."""
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, tuple | list):
        return type(value)(_retype(item, dtype) for item in value)
    if isinstance(value, Mapping):
        return {name: _retype(item, dtype) for name, item in value.items()}
    return value


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Map each node to the values nobody reads after it."""
    kept = set(output_nodes(graph))
    seen: set[fx.Node] = set()
    frees: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in (node, *node.all_input_nodes):
            if source not in seen and source not in kept and node.op != "output":
                frees.setdefault(node, []).append(source)
            seen.add(source)
    return frees
