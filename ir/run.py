"""Run a program node by node: the reference every engine is measured against.

Slow and simple. It can compute in another precision, which gives the fp64 reference of a
certificate, and it can show the outputs of each block as they appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any

import torch
from torch import Tensor, fx

from .branches import branches_of, is_cond, operands_of
from .graphs import output_nodes, remembered
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
        inputs: Tensors for the placeholders of `main`, state included; see `Program.completed`.
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


@dataclass(frozen=True)
class Paused:
    """A run that has stopped before a node of `main`.

    Attributes:
        node: The node.
        env: Values that are still needed.
    """

    node: fx.Node
    env: Mapping[fx.Node, Any]


def run_until(
    program: Program, inputs: Sequence[Tensor], node: fx.Node, *, instead: Replaced = ()
) -> Paused:
    """Run the program up to a node of `main`; `run_on` goes on, as often as one likes."""
    runner, env = _Runner(program, None, None, None, instead), dict[fx.Node, Any]()
    before = takewhile(lambda n: n is not node, program.main.nodes)
    with torch.no_grad():
        runner.nodes(program.main, before, env, iter(inputs), None)
    return Paused(node, env)


def run_on(program: Program, paused: Paused, *, instead: Replaced = ()) -> list[Any]:
    """Run the rest of a program; returns its flat outputs.

    Args:
        program: The program.
        paused: How far it has come; stays as it is.
        instead: Regions of the rest, and what is called in the place of each.
    """
    runner, env = _Runner(program, None, None, None, instead), dict(paused.env)
    after = dropwhile(lambda n: n is not paused.node, program.main.nodes)
    with torch.no_grad():
        runner.nodes(program.main, after, env, iter(()), None)
    return [env[node] for node in output_nodes(program.main)]


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

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        given = self.program.completed(inputs)
        return self._graph(MAIN, None, list(map(self._convert, given)))

    def _graph(self, key: str, instance: str | None, inputs: Sequence[Any]) -> list[Any]:
        graph = self.program.graphs[key]
        env: dict[fx.Node, Any] = {}
        self.nodes(graph, graph.nodes, env, iter(inputs), instance)
        return [env[node] for node in output_nodes(graph)]

    def nodes(
        self,
        graph: fx.Graph,
        nodes: Iterable[fx.Node],
        env: dict[fx.Node, Any],
        given: Iterator[Any],
        instance: str | None,
    ) -> None:
        """Run some nodes of a graph in order; values that nobody reads later leave `env`."""
        frees = remembered(graph, _last_uses, _last_uses)
        for node in nodes:
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

    def node(
        self, node: fx.Node, env: dict[fx.Node, Any], given: Iterator[Any], instance: str | None
    ) -> Any:
        if node.op == "placeholder":
            return next(given)
        if node.op == "get_attr":
            return self._convert(self.program.weight(str(node.target), instance))
        if is_cond(node):
            return self._choose(node, env, instance)
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
        # What an op makes of no tensor (`arange(0., 4.)`) has the type it takes by default.
        return self._convert(node.target(*args, **kwargs))

    def _choose(
        self, node: fx.Node, env: dict[fx.Node, Any], instance: str | None
    ) -> tuple[Any, ...]:
        """Compute one of two branches, and nothing of the other."""
        first, second = branches_of(node)
        predicate: Any = node.args[0]
        key = first if bool(env[predicate]) else second
        return tuple(self._graph(key, instance, [env[o] for o in operands_of(node)]))

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
