"""Fold repeated blocks into one graph per class.

A residual network runs its blocks one after the other, so in execution order a stack is a
*periodic* stretch: node i does what node i + p does. Folding finds such stretches by hashing what
each node does (op, constants, shapes; never names), cuts them where residual blocks end, and
proves node by node that every block is isomorphic to its neighbour before it may share a graph.

Every step is linear in the number of nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from .graphs import common_prefix, module_path, output_nodes
from .program import MAIN, Instance, Program
from .shapes import describe
from .stretches import Stretch, find_stretches, intern


def fold_blocks(program: Program) -> Program:
    """Return the program with repeated stretches of its main graph as block instances."""
    nodes = [n for n in program.main.nodes if n.op == "call_function"]
    keys = intern([_node_key(node) for node in nodes])
    key_of = dict(zip(nodes, keys, strict=True))
    order = {node: index for index, node in enumerate(nodes)}
    groups: list[list[Isomorph]] = []
    for stretch in find_stretches(keys, nodes):
        if _chained(nodes, stretch):
            groups += _isomorphic_runs(nodes, stretch, key_of)
    graphs: list[fx.Graph] = []
    found: list[tuple[int, Occurrence]] = []
    for group in groups:
        outputs = sorted({position for iso in group for position in iso.escaping()})
        occurrences = _occurrences(sorted(group, key=lambda iso: order[iso.nodes[0]]), outputs)
        found += [(len(graphs), occurrence) for occurrence in occurrences]
        first = group[0]  # of all blocks the one whose inputs are least likely to coincide
        slots = dict(zip(first.weights, _slots(first), strict=True))
        results = [first.nodes[position] for position in outputs]
        graphs.append(class_graph(first.nodes, first.inputs, slots, results, first.path))
    return outline(program, graphs, found) if graphs else program


@dataclass
class Isomorph:
    """A block matched against the reference block of its class.

    Attributes:
        nodes: The block's nodes; equal positions correspond.
        inputs: Outside values it reads, in the reference's order.
        weights: Outside `get_attr` nodes it reads, in the reference's order.
    """

    nodes: Sequence[fx.Node]
    inputs: list[fx.Node]
    weights: list[fx.Node]

    @cached_property
    def path(self) -> str:
        """Path of the innermost module that holds the block."""
        return common_prefix(path for path in map(module_path, self.nodes) if path)

    def escaping(self) -> list[int]:
        """Return the positions of nodes read outside the block."""
        inside = set(self.nodes)
        return [i for i, n in enumerate(self.nodes) if any(u not in inside for u in n.users)]


def _chained(nodes: Sequence[fx.Node], stretch: Stretch) -> bool:
    """Whether every block reads the one before it; parallel projections are no blocks."""
    first, size = stretch.start, stretch.period
    for begin in range(first + size, first + stretch.count * size, size):
        before = set(nodes[begin - size : begin])
        if all(before.isdisjoint(n.all_input_nodes) for n in nodes[begin : begin + size]):
            return False
    return True


def _isomorphic_runs(
    nodes: Sequence[fx.Node], stretch: Stretch, keys: Mapping[fx.Node, int]
) -> list[list[Isomorph]]:
    """Match the blocks of a stretch; a block unlike its class starts a new one."""
    blocks = [
        nodes[stretch.start + k * stretch.period :][: stretch.period] for k in range(stretch.count)
    ]
    runs: list[list[Isomorph]] = []
    # The second block is a better reference than the first, whose inputs may coincide.
    pending = [blocks[1], blocks[0], *blocks[2:]]
    for block in pending:
        for run in runs:
            match = _match(run[0], block, keys)
            if match is not None:
                run.append(match)
                break
        else:
            runs.append([_reference(block)])
    return [run for run in runs if len(run) > 1]


def _reference(block: Sequence[fx.Node]) -> Isomorph:
    inside = set(block)
    inputs: dict[fx.Node, None] = {}
    weights: dict[fx.Node, None] = {}
    for node in block:
        for source in _sources(node):
            if source not in inside:
                (weights if source.op == "get_attr" else inputs)[source] = None
    return Isomorph(block, list(inputs), list(weights))


def _match(
    reference: Isomorph, block: Sequence[fx.Node], keys: Mapping[fx.Node, int]
) -> Isomorph | None:
    """Walk two blocks side by side; None at the first node that disagrees."""
    image: dict[fx.Node, fx.Node] = dict(zip(reference.nodes, block, strict=True))
    inside, outside = set(image), set(block)
    for ours, theirs in zip(reference.nodes, block, strict=True):
        if keys[ours] != keys[theirs]:
            return None
        for a, b in zip(_sources(ours), _sources(theirs), strict=True):
            if (a in inside) != (b in outside):
                return None
            if a not in inside and (a.op == "get_attr") != (b.op == "get_attr"):
                return None
            if image.setdefault(a, b) is not b:
                return None
    weights = [image[node] for node in reference.weights]
    if len(set(weights)) != len(weights):
        return None  # weights tied here and not there: another class
    return Isomorph(block, [image[node] for node in reference.inputs], weights)


def _occurrences(group: list[Isomorph], outputs: list[int]) -> list[Occurrence]:
    return [
        Occurrence(
            path=iso.path,
            anchor=iso.nodes[0],
            inputs=iso.inputs,
            results=[[iso.nodes[position]] for position in outputs],
            owned=set(iso.nodes),
            weights=[str(weight.target) for weight in iso.weights],
        )
        for iso in group
    ]


@dataclass(frozen=True)
class Occurrence:
    """Where a block stands in the main graph.

    Attributes:
        path: Module path, the name of the instance if it is free.
        anchor: The node in whose place the call comes.
        inputs: What the call passes: nodes of main, or what stands for results of other calls.
        results: What stands for each output, here and in inputs of calls after this one.
        owned: Nodes the call replaces.
        weights: Tensor names, in the order of the class graph's slots.
    """

    path: str
    anchor: fx.Node
    inputs: Sequence[Hashable]
    results: Sequence[Sequence[Hashable]]
    owned: set[fx.Node]
    weights: Sequence[str]


def outline(
    program: Program, classes: Sequence[fx.Graph], found: Sequence[tuple[int, Occurrence]]
) -> Program:
    """Return the program with occurrences in main replaced by calls of their class graphs.

    Args:
        program: A program without instances.
        classes: Class graphs.
        found: Occurrences with the position of their class, those at one anchor in order.
    """
    graphs = {f"block{number}": graph for number, graph in enumerate(classes)}
    slots = [[str(n.target) for n in graph.nodes if n.op == "get_attr"] for graph in classes]
    instances: dict[str, Instance] = {}
    at: dict[fx.Node, list[tuple[str, Occurrence]]] = {}
    owned: set[fx.Node] = set()
    for number, occurrence in found:
        weights = dict(zip(slots[number], occurrence.weights, strict=True))
        name = _unique(occurrence.path, instances)
        instances[name] = Instance(f"block{number}", weights)
        at.setdefault(occurrence.anchor, []).append((name, occurrence))
        owned |= occurrence.owned
    returned = {
        block: tuple(node.meta["val"] for node in output_nodes(graph))
        for block, graph in graphs.items()
    }
    main = fx.Graph()
    env: dict[Hashable, fx.Node] = {}
    for node in program.main.nodes:
        for name, occurrence in at.get(node, ()):
            _call(main, name, occurrence, returned[instances[name].block], env)
        if node not in owned and not (node.op == "get_attr" and owned.issuperset(node.users)):
            env[node] = main.node_copy(node, env.__getitem__)
    ordered = {str(n.target): instances[str(n.target)] for n in main.nodes if n.op == "call_module"}
    return program.with_(graphs={**program.graphs, MAIN: main, **graphs}, instances=ordered)


def _call(
    main: fx.Graph,
    name: str,
    occurrence: Occurrence,
    values: tuple[object, ...],
    env: dict[Hashable, fx.Node],
) -> None:
    """Append a call and what picks its outputs."""
    call = main.call_module(name, tuple(env[value] for value in occurrence.inputs))
    call.meta["val"] = values
    for index, names in enumerate(occurrence.results):
        if names:
            picked = main.call_function(operator.getitem, (call, index))
            picked.meta = {"val": values[index]}
            env.update(dict.fromkeys(names, picked))


def class_graph(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    weights: Mapping[fx.Node, str],
    results: Sequence[fx.Node],
    path: str,
) -> fx.Graph:
    """Copy a block's nodes into a graph of their own.

    Args:
        nodes: What the block computes, in order.
        inputs: Outside values it reads.
        weights: Slot name of every weight it reads.
        results: Which of its nodes are outputs.
        path: Module path of the block, cut off the paths of its nodes.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        env[node] = graph.placeholder(f"x{index}" if len(inputs) > 1 else "x")
        env[node].meta = dict(node.meta)
    for node, slot in weights.items():
        env[node] = graph.get_attr(slot)
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta["local_path"] = module_path(node).removeprefix(path).strip(".")
    graph.output(tuple(env[node] for node in results))
    return graph


def _slots(iso: Isomorph) -> list[str]:
    """Name the weights of a class by their path below the block."""
    prefix = iso.path
    names: dict[str, None] = {}
    for weight in iso.weights:
        target = str(weight.target)
        local = target.removeprefix(f"{prefix}.") if prefix else target
        names[_unique(local, names)] = None
    return list(names)


def _unique(name: str, taken: object) -> str:
    name, count = name or "block", 1
    candidate = name
    while candidate in taken:  # type: ignore[operator]
        candidate, count = f"{name}#{count}", count + 1
    return candidate


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return argument nodes with repeats, in argument order."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def _node_key(node: fx.Node) -> object:
    """Say what a node does, without saying to which values."""

    def place(source: fx.Node) -> object:
        kind = "weight" if source.op == "get_attr" else "value"
        return (kind, describe(source.meta.get("val")))

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), place)  # type: ignore[arg-type]
    return (str(node.target), repr(args), repr(kwargs), repr(describe(node.meta.get("val"))))
