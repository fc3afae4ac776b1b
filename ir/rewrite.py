"""Replace regions by modules: trace once, splice, and fill the slots of every instance.

Replacements of one region in many instances of a class are traced once when they are built alike
(same module types, options and weight shapes); only their weights differ. Instances that disagree
about what stands where no longer share a graph: the class splits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count
from typing import Any

from torch import Tensor, fx, nn

from .branches import executed, scope
from .errors import VerifyError
from .graphs import argument_positions, copy_graph, output_nodes, place_of, remove_dead
from .program import MAIN, Instance, Program
from .regions import Region
from .replacement import Replacement
from .splice import Slot, Splicer


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
    splicer = Splicer(program, by)
    change = _Change(dict(program.graphs), dict(program.instances))
    if None in by_place:
        done = splicer.splice(MAIN, MAIN, by_place[None])
        change.graphs.update(done.graphs)
        change.unnamed.update(done.fresh)
        for slot, tensor in _filled(done.slots, by_place[None]):
            change.add(slot.name, tensor, slot.rename)
    for block in dict.fromkeys(instance.block for instance in program.instances.values()):
        _rewrite_class(splicer, block, by_place, change)
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
            for key in scope(self.graphs, MAIN)
            for node in self.graphs[key].nodes
            if node.op == "get_attr" and node not in self.unnamed
        }
        taken.update(slot.name for slot in program.state)
        for instance in self.instances.values():
            taken.update(instance.weights.values())
        taken.update(program.aliases)
        tensors, parameters = dict(program.tensors), set[str]()
        held = {place_of(tensor): name for name, tensor in tensors.items()}
        kept = {held.get(place_of(tensor), "") for _, tensor, _ in self.added}
        modules = {module for name in taken | kept for module in _modules(name)}
        for wanted, tensor, settle in self.added:
            place = place_of(tensor)
            name = held.get(place)
            if name is None:  # not a tensor the program has already
                name = next(n for n in _variants(wanted) if n not in taken and n not in modules)
                if name in tensors:  # nobody reads the old one any more
                    held.pop(place_of(tensors[name]), None)
                tensors[name] = tensor.detach()
                held[place] = name
                if isinstance(tensor, nn.Parameter):
                    parameters.add(name)
            taken.add(name)
            modules.update(_modules(name))
            settle(name)
        return tensors, parameters


def _modules(name: str) -> Iterator[str]:
    """Yield the modules a weight is in; no other weight can have the name of one."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def _variants(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}#{number}" for number in count(1))


def _filled(
    slots: Sequence[Slot], replacements: Sequence[Replacement]
) -> list[tuple[Slot, Tensor]]:
    """Pair new slots with the tensors of one instance; slots that nothing reads are gone."""
    tensors = [tensor for replacement in replacements for tensor in replacement.tensors]
    return [(slot, t) for slot, t in zip(slots, tensors, strict=True) if slot.nodes]


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


def _rewrite_class(
    splicer: Splicer,
    block: str,
    by_place: Mapping[str | None, list[Replacement]],
    change: _Change,
) -> None:
    """Rewrite the instances of a class, splitting it where they disagree."""
    program = splicer.program
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
        done = splicer.splice(block, target, by_place.get(names[0], []))
        change.graphs.update(done.graphs)
        kept = done.kept
        for name in names:
            before = program.instances[name].weights
            weights = {slot: before[slot] for slot in kept} if key else dict(before)
            for slot, tensor in _filled(done.slots, by_place.get(name, [])):
                change.add(
                    f"{name}.{slot.name}", tensor, partial(dict.__setitem__, weights, slot.name)
                )
            change.instances[name] = Instance(target, weights)


def _finish(program: Program, change: _Change) -> Program:
    """Assemble the new program and drop tensors that only replaced regions read."""
    _bypass_idle(program, change)
    _forget_unread(program, change)
    graphs, instances = change.graphs, change.instances
    order = [str(n.target) for n in executed(graphs, MAIN) if n.op == "call_module"]
    roots = {MAIN, *(instances[name].block for name in order)}
    live = {key for root in roots for key in scope(graphs, root)}
    tensors, parameters = change.settle(program)
    new = program.with_(
        graphs={key: graph for key, graph in graphs.items() if key in live},
        instances={name: instances[name] for name in order},
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


def _bypass_idle(program: Program, change: _Change) -> None:
    """Take calls of instances that compute nothing any more out of main."""
    idle = {key for key, graph in change.graphs.items() if key != MAIN and _is_idle(graph)}
    names = {name for name, instance in change.instances.items() if instance.block in idle}
    for graph in _callers(program, change, names):
        _bypass(graph, {name: change.graphs[change.instances[name].block] for name in names})


def _callers(program: Program, change: _Change, names: Collection[str]) -> Iterator[fx.Graph]:
    """Yield the graphs that call some instances, each a copy that may be edited."""
    for key, graph in list(change.graphs.items()):
        if not any(node.op == "call_module" and str(node.target) in names for node in graph.nodes):
            continue
        if graph is program.graphs.get(key):
            graph = change.graphs[key] = copy_graph(graph)
        yield graph


def _bypass(graph: fx.Graph, idle: Mapping[str, fx.Graph]) -> None:
    """Let readers of calls of classes that compute nothing read what the calls are given."""
    for call in [n for n in graph.nodes if n.op == "call_module" and str(n.target) in idle]:
        block = idle[str(call.target)]
        places = argument_positions(block)
        given: list[Any] = [call.args[places[node]] for node in output_nodes(block)]
        for pick in list(call.users):
            pick.replace_all_uses_with(given[pick.args[1]])
            graph.erase_node(pick)
        graph.erase_node(call)
    remove_dead(graph)


def _forget_unread(program: Program, change: _Change) -> None:
    """Take away the arguments that blocks have read so far and do not read any more."""
    unread: dict[str, list[int]] = {}
    for name, instance in change.instances.items():
        old, new = program.graphs[program.instances[name].block], change.graphs[instance.block]
        if new is not old and instance.block not in unread:
            pairs = list(zip(_places(old), _places(new), strict=True))
            unread[instance.block] = [
                i for i, (before, after) in enumerate(pairs) if before.users and not after.users
            ]
            for index in unread[instance.block]:
                new.erase_node(pairs[index][1])
    gone = {
        name: found
        for name, instance in change.instances.items()
        if (found := unread.get(instance.block))
    }
    for graph in _callers(program, change, gone):
        for call in graph.nodes:
            if call.op == "call_module" and str(call.target) in gone:
                dropped = gone[str(call.target)]
                call.args = tuple(a for i, a in enumerate(call.args) if i not in dropped)
        remove_dead(graph)


def _places(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _is_idle(graph: fx.Graph) -> bool:
    return all(node.op in ("placeholder", "output") for node in graph.nodes)
