"""Replace regions by modules: trace once, splice, and fill the slots of every instance.

Replacements of one region in many instances of a class are traced once when they are built alike
(same module types, options and weight shapes); only their weights differ. Instances that disagree
about what stands where no longer share a graph: the class splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from .blueprint import blueprint
from .errors import VerifyError
from .graphs import copy_graph, output_nodes, place_of, remove_dead
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
    for found in by_place.values():
        _refuse_overlap([replacement.region for replacement in found], by)
    traces: dict[Any, Traced] = {}
    change = _Change(dict(program.graphs), dict(program.instances))
    if None in by_place:
        graph, slots = _splice(program.main, by_place[None], traces, by)
        change.graphs[MAIN] = graph
        change.unnamed.update(slots)
        for node, tensor in _filled(slots, by_place[None]):
            change.add(str(node.target), tensor, partial(setattr, node, "target"))
    for block in dict.fromkeys(instance.block for instance in program.instances.values()):
        _rewrite_class(program, block, by_place, traces, by, change)
    return _finish(program, change)


@dataclass
class _Change:
    """What a rewrite gathers before it becomes a program.

    Names of new tensors are settled last, when it is known which old ones are still read.
    """

    graphs: dict[str, fx.Graph]
    instances: dict[str, Instance]
    added: list[tuple[str, Tensor, Callable[[str], None]]] = field(default_factory=list)
    unnamed: set[fx.Node] = field(default_factory=set)

    def add(self, name: str, tensor: Tensor, settle: Callable[[str], None]) -> None:
        """Keep a tensor under `name` or a name like it; `settle` is told which."""
        self.added.append((name, tensor, settle))

    def settle(self, program: Program) -> tuple[dict[str, Tensor], set[str]]:
        """Name the new tensors; return all tensors, and which of the new are parameters."""
        taken = {
            str(node.target)
            for node in self.graphs[MAIN].nodes
            if node.op == "get_attr" and node not in self.unnamed
        }
        taken.update(slot.name for slot in program.state)
        for instance in self.instances.values():
            taken.update(instance.weights.values())
        taken.update(program.aliases)
        tensors, parameters = dict(program.tensors), set[str]()
        held = {place_of(tensor): name for name, tensor in tensors.items()}
        for wanted, tensor, settle in self.added:
            place = place_of(tensor)
            name = held.get(place)
            if name is None:  # not a tensor the program has already
                name = next(n for n in _variants(wanted) if n not in taken)
                if name in tensors:  # nobody reads the old one any more
                    held.pop(place_of(tensors[name]), None)
                tensors[name] = tensor.detach()
                held[place] = name
                if isinstance(tensor, nn.Parameter):
                    parameters.add(name)
            taken.add(name)
            settle(name)
        return tensors, parameters


def _variants(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}#{number}" for number in count(1))


def _filled(
    slots: Sequence[fx.Node], replacements: Sequence[Replacement]
) -> list[tuple[fx.Node, Tensor]]:
    """Pair new slots with the tensors of one instance; slots that nothing reads are gone."""
    tensors = [tensor for r in replacements for tensor in r.weights.values()]
    return [(node, t) for node, t in zip(slots, tensors, strict=True) if not node._erased]


def _refuse_overlap(regions: Sequence[Region], by: str) -> None:
    seen: dict[fx.Node, Region] = {}
    for region in regions:
        if not region.inputs:  # constants may share the way to them, which is dead afterwards
            continue
        for node in region.nodes:
            if node in seen:
                raise VerifyError(
                    f"{by} replaces {node.name} twice.",
                    where=f"{region.label} and {seen[node].label}",
                    remedy="leave one of them out with exclude=..., and run the pass again.",
                )
            seen[node] = region


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

    # Old and new program share symbols: a trace that asks for a size may not settle it for both.
    with torch.no_grad(), mode, mode.shape_env.suppress_guards():
        # Tracing tells values apart by identity, and two nodes may record one and the same.
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
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
        fresh = set(slots)
        kept = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n not in fresh}
        change.graphs[target] = graph
        for name in names:
            weights = {s: program.instances[name].weights[s] for s in kept}
            for node, tensor in _filled(slots, by_place[name]):
                slot = str(node.target)
                change.add(f"{name}.{slot}", tensor, partial(weights.__setitem__, slot))
            change.instances[name] = Instance(target, weights)


def _splice(
    old: fx.Graph, replacements: Sequence[Replacement], traces: dict[Any, Traced], by: str
) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy a graph with regions replaced; return it with the `get_attr` nodes of new weights."""
    mapping: dict[fx.Node, fx.Node] = {}
    graph = copy_graph(old, mapping)
    order = {node: index for index, node in enumerate(old.nodes)}
    new: list[fx.Node] = []
    for replacement in replacements:
        region = replacement.region
        inputs = [mapping[node] for node in region.inputs]
        values = [node.meta["val"] for node in inputs]
        key = (replacement.key, tuple(map(describe, values)))
        if key not in traces:
            traces[key] = trace(replacement.module, values, fake_mode(old))
        latest = max((order[node] for node in region.inputs), default=-1)
        anchor = next(node for node in region.nodes if order[node] > latest)
        with graph.inserting_before(mapping[anchor]):
            results, weights = _insert(graph, replacement, traces[key], inputs, by)
        new += weights
        for node, result in zip(region.outputs, results, strict=True):
            mapping[node].replace_all_uses_with(result)
            mapping[node] = result
    remove_dead(graph)
    _name_slots(graph, new)
    return graph, new


def _name_slots(graph: fx.Graph, new: Sequence[fx.Node]) -> None:
    """Give new slots names that no other slot of the graph has."""
    fresh = set(new)
    taken = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n not in fresh}
    for node in new:
        node.target = next(name for name in _variants(str(node.target)) if name not in taken)
        taken.add(node.target)


def _insert(
    graph: fx.Graph,
    replacement: Replacement,
    traced: Traced,
    inputs: list[fx.Node],
    by: str,
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Copy the traced nodes to the insertion point; return results and new weights."""
    region = replacement.region
    given = iter([None] * len(traced.weights) + list(inputs))
    names = iter(traced.weights)
    env: dict[fx.Node, fx.Node] = {}
    weights: list[fx.Node] = []
    source = region.outputs[0]
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            value = next(given)
            if value is None:
                value = graph.get_attr(replacement.slot(next(names)))
                value.meta = {"val": node.meta["val"]}
                weights.append(value)
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
    return results, weights


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
    tensors, parameters = change.settle(program)
    new = program.with_(
        graphs={key: graph for key, graph in change.graphs.items() if key in live},
        instances={name: change.instances[name] for name in order},
        tensors=tensors,
        parameters=program.parameters | parameters,
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
