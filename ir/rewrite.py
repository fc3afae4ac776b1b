"""Replace regions by modules: trace once, splice, and fill the slots of every instance.

Replacements of one region in many instances of a class are traced once when they are built alike
(same module types, options and weight shapes); only their weights differ. Instances that disagree
about what stands where no longer share a graph: the class splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from .blueprint import blueprint
from .errors import VerifyError
from .graphs import copy_graph, output_nodes, remove_dead
from .program import MAIN, Instance, Program
from .regions import Region
from .shapes import describe, fake_mode


@dataclass(frozen=True)
class Replacement:
    """A region and what stands in its place.

    Attributes:
        region: What is replaced.
        module: What replaces it.
        weights: Parameters and buffers of the module by name.
        key: How the module is built, weight values left out; equal keys trace equally.
    """

    region: Region
    module: nn.Module
    weights: Mapping[str, Tensor]
    key: object

    @classmethod
    def of(cls, region: Region, module: nn.Module) -> Self:
        """Look a module over, once."""
        weights, key = blueprint(module)
        return cls(region, module, weights, key)

    def slots(self) -> dict[str, Tensor]:
        """Return the weights by the slots of the class graph they will fill."""
        return {self.slot(name): tensor for name, tensor in self.weights.items()}

    def slot(self, name: str) -> str:
        """Return the slot of a weight."""
        return f"{self.region.path}.{name}" if self.region.path else name


def rewrite(
    program: Program, replacements: Sequence[tuple[Region, nn.Module]], *, by: str
) -> Program:
    """Return a program in which each region is replaced by its module.

    Args:
        program: Where the regions were found.
        replacements: Regions, none overlapping, and modules that take the region's inputs and
            return its outputs (a tensor, or a tuple for several).
        by: Name of the pass, kept in the provenance of new nodes.

    Raises:
        VerifyError: A module returns another number, shape or type of values than its region.
    """
    by_place: dict[str | None, list[Replacement]] = {}
    for region, module in replacements:
        by_place.setdefault(region.instance, []).append(Replacement.of(region, module))
    traces: dict[Any, Traced] = {}
    change = _Change(dict(program.graphs), dict(program.instances), {}, set())
    if None in by_place:
        graph, slots = _splice(program.main, by_place[None], traces, by)
        change.graphs[MAIN] = graph
        for slot, tensor in slots.items():
            change.add(slot, tensor)
    for block in dict.fromkeys(instance.block for instance in program.instances.values()):
        _rewrite_class(program, block, by_place, traces, by, change)
    return _finish(program, change)


@dataclass
class _Change:
    """What a rewrite gathers before it becomes a program."""

    graphs: dict[str, fx.Graph]
    instances: dict[str, Instance]
    tensors: dict[str, Tensor]
    parameters: set[str]

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            self.parameters.add(name)


@dataclass(frozen=True)
class Traced:
    """A module as a graph: its weights come first among the placeholders.

    Attributes:
        graph: Placeholders for `weights`, then for the inputs.
        weights: Names of parameters and buffers within the module.
    """

    graph: fx.Graph
    weights: tuple[str, ...]


def trace(module: nn.Module, inputs: Sequence[Any], mode: Any) -> Traced:
    """Trace a module on fake inputs, keeping `linear`, `softmax` and the like as single ops."""
    named, _ = blueprint(module)
    with mode:
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in named.values()]

    def call(*flat: Any) -> Any:
        weights = dict(zip(named, flat[: len(named)], strict=True))
        return torch.func.functional_call(module, weights, flat[len(named) :])

    with torch.no_grad(), mode:
        traced = make_fx(call, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *fakes, *inputs
        )
    remove_dead(traced.graph)
    return Traced(traced.graph, tuple(named))


def _rewrite_class(
    program: Program,
    block: str,
    by_place: Mapping[str | None, list[Replacement]],
    traces: dict[Any, Traced],
    by: str,
    change: _Change,
) -> None:
    """Rewrite the instances of a class, splitting it where they disagree."""
    variants: dict[Any, list[str]] = {}
    for name in program.instances_of(block):
        changes = by_place.get(name, [])
        key = tuple((change.region.nodes, change.key) for change in changes)
        variants.setdefault(key, []).append(name)
    used = set(change.graphs)
    for key, names in variants.items():
        target = block
        if key != next(iter(variants)):
            target = next(t for i in range(1, len(used) + 2) if (t := f"{block}.{i}") not in used)
            used.add(target)
        if not key:
            change.graphs[target] = program.graphs[block]
            for name in names:
                change.instances[name] = Instance(target, program.instances[name].weights)
            continue
        graph, slots = _splice(program.graphs[block], by_place[names[0]], traces, by)
        kept = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - slots.keys()
        change.graphs[target] = graph
        for name in names:
            weights = {s: program.instances[name].weights[s] for s in kept}
            for replacement in by_place[name]:
                for slot, tensor in replacement.slots().items():
                    weights[slot] = f"{name}.{slot}"
                    change.add(weights[slot], tensor)
            change.instances[name] = Instance(target, weights)


def _splice(
    old: fx.Graph, replacements: Sequence[Replacement], traces: dict[Any, Traced], by: str
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy a graph with regions replaced; return it with the tensors of its new slots."""
    mapping: dict[fx.Node, fx.Node] = {}
    graph = copy_graph(old, mapping)
    slots: dict[str, Tensor] = {}
    for replacement in replacements:
        region = replacement.region
        slots |= replacement.slots()
        inputs = [mapping[node] for node in region.inputs]
        values = [node.meta["val"] for node in inputs]
        key = (replacement.key, tuple(map(describe, values)))
        if key not in traces:
            traces[key] = trace(replacement.module, values, fake_mode(old))
        results = _insert(graph, replacement, traces[key], inputs, mapping, by)
        for node, result in zip(region.outputs, results, strict=True):
            mapping[node].replace_all_uses_with(result)
            mapping[node] = result
    remove_dead(graph)
    return graph, slots


def _insert(
    graph: fx.Graph,
    replacement: Replacement,
    traced: Traced,
    inputs: list[fx.Node],
    mapping: Mapping[fx.Node, fx.Node],
    by: str,
) -> list[fx.Node]:
    """Copy the traced nodes to where the region stands and return their results."""
    region = replacement.region
    first = mapping[region.nodes[0]]
    given = iter([None] * len(traced.weights) + list(inputs))
    names = iter(traced.weights)
    env: dict[fx.Node, fx.Node] = {}
    source = region.outputs[0]
    with graph.inserting_before(first):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
                if value is None:
                    env[node] = graph.get_attr(replacement.slot(next(names)))
                    env[node].meta = {"val": node.meta["val"]}
                else:
                    env[node] = value
            elif node.op != "output":
                if node.op == "get_attr":
                    raise VerifyError(
                        f"{by}: the replacement makes a tensor inside forward ({node.target}).",
                        where=region.label,
                        remedy="register it as a buffer of the module.",
                    )
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = {
                    "val": node.meta.get("val"),
                    "nn_module_stack": source.meta.get("nn_module_stack", {}),
                    "stack_trace": source.meta.get("stack_trace"),
                    "local_path": region.path,
                    "from_node": [NodeSource(source, by, NodeSourceAction.REPLACE)],
                }
    results = [env[node] for node in output_nodes(traced.graph)]
    _check_outputs(region, results, by)
    return results


def _check_outputs(region: Region, results: Sequence[fx.Node], by: str) -> None:
    old = [describe(node.meta["val"]) for node in region.outputs]
    new = [describe(node.meta["val"]) for node in results]
    if old != new:
        raise VerifyError(
            f"{by} changed the output from {_shapes(old)} to {_shapes(new)}.",
            where=f"{region.label} (node {region.outputs[0].name})",
            remedy=f"leave this one out with exclude={region.label!r}, and report it.",
        )


def _finish(program: Program, change: _Change) -> Program:
    """Assemble the new program and drop tensors that only replaced regions read."""
    order = [str(node.target) for node in change.graphs[MAIN].nodes if node.op == "call_module"]
    live = {MAIN, *(change.instances[name].block for name in order)}
    tensors = {**program.tensors, **change.tensors}
    new = program.with_(
        graphs={key: graph for key, graph in change.graphs.items() if key in live},
        instances={name: change.instances[name] for name in order},
        tensors=tensors,
        parameters=program.parameters | change.parameters,
    )
    dropped = new.unused_tensors() - program.unused_tensors()
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return new.with_(
        tensors=kept,
        parameters=frozenset(name for name in new.parameters if name in kept),
        aliases={alias: name for alias, name in program.aliases.items() if name in kept},
    )


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(f"{list(v[0])} {v[1]}" if isinstance(v, tuple) else str(v) for v in values)
