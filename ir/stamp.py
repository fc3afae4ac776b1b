"""Capture a deep model one block per kind, and stamp the rest.

`torch.export` takes milliseconds per node, so a thousand equal blocks take minutes. Here the first
block of each kind runs while exporting, and calls of the others are noted down (`ir.press`).
Afterwards the first block's nodes become a class graph, and each call one of it, with that block's
own weights. Whatever does not fit raises `Unfit`, and the model is captured flat. One stamped block
of each kind is exported on its own as a check.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .blueprint import named_tensors
from .branches import is_cond
from .fold import Occurrence, class_graph, outline
from .graphs import is_mutable
from .hidden import Unfit
from .marks import Call, Kind, Layout, Mark, Value
from .press import Press
from .program import Program


class _Place(NamedTuple):
    """A mark in the graph, and the nodes that pick its values by position."""

    node: fx.Node
    mark: Mark
    picked: Mapping[int, fx.Node]

    @property
    def values(self) -> Sequence[fx.Node]:
        """What the mark was given."""
        return self.node.args[0]  # type: ignore[return-value]


class _Class(NamedTuple):
    """A class graph.

    Attributes:
        graph: The graph.
        read: Which of the tensors a block is given it reads.
        slots: Name below the block of the weight in each slot; or a constant, and True.
    """

    graph: fx.Graph
    read: Sequence[int]
    slots: Sequence[tuple[str, bool]]

    def weights(self, path: str, program: Program) -> list[str]:
        """Return the tensor in each slot for the block at a path."""
        return [
            name if constant else _canonical(program, f"{path}.{name}")
            for name, constant in self.slots
        ]


def stamp(program: Program, press: Press, held: Container[str]) -> Program:
    """Turn the marks in a flat program into classes and calls.

    Args:
        program: What was exported while the press was open.
        press: What it saw.
        held: Names of all tensors of the model; others are constants that its code makes.

    Raises:
        Unfit: A block reads weights that are not its own, or writes into a tensor.
    """
    _refuse_parallel(program, press)
    nodes = list(program.main.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    places = [_place(node, press) for node in nodes if node.target is _MARK]
    leaves = {place.mark.kind: place for place in places if place.mark.role == "leave"}
    classes: dict[Kind, _Class] = {}
    found: list[tuple[Kind, Occurrence]] = []
    for enter in places:
        if enter.mark.role == "enter":
            leave = leaves[enter.mark.kind]
            inner = nodes[position[enter.node] + 1 : position[leave.node]]
            made = classes[enter.mark.kind] = _class(enter, leave, inner, program, held)
            owned = {enter.node, leave.node, *leave.picked.values()}
            owned.update(node for node in inner if node.op == "call_function")
            found.append((enter.mark.kind, _first(enter, leave, made, owned, program)))
    found += _calls([p for p in places if p.mark.role == "calls"], classes, program)
    numbers = {kind: number for number, kind in enumerate(classes)}
    graphs = [made.graph for made in classes.values()]
    return outline(program, graphs, [(numbers[kind], where) for kind, where in found])


def _refuse_parallel(program: Program, press: Press) -> None:
    """Refuse blocks of which none reads what another one computed: they are no stack."""
    stacked: set[Kind] = set()
    behind: set[fx.Node] = set()  # what depends on a block
    for node in program.main.nodes:
        late = not behind.isdisjoint(node.all_input_nodes)
        mark = _place(node, press).mark if node.target is _MARK else None
        if mark is not None and mark.role == "calls":
            stacked.update(
                call.kind
                for call in mark.calls
                if late or any(isinstance(source, Value) for source in call.inputs)
            )
        elif mark is not None and late and mark.role == "enter":
            stacked.add(mark.kind)
        if late or (mark is not None and mark.role != "enter"):
            behind.add(node)
    for kind in {mark.kind for mark in press.marks} - stacked:
        press.unfit.add(kind.number)
        raise Unfit(f"{kind.path} is no block of a stack")


def _class(
    enter: _Place,
    leave: _Place,
    inner: Sequence[fx.Node],
    program: Program,
    held: Container[str],
) -> _Class:
    """Make the class graph of the block between two marks."""
    kind = enter.mark.kind
    read = sorted(enter.picked)  # an input the block ignores is not passed
    inputs = [enter.picked[index] for index in read]
    computed = [n for n in inner if n.op == "call_function" and n not in inputs]
    inside = {*inputs, *computed}
    own = {
        _canonical(program, f"{kind.path}.{name}"): name for name, _ in named_tensors(kind.block)
    }
    slots: dict[fx.Node, tuple[str, bool]] = {}
    for node in computed:
        if is_mutable(node):
            raise Unfit(f"{kind.path} writes into a tensor")
        if is_cond(node):
            raise Unfit(f"{kind.path} chooses between branches")
        if not inside.issuperset(set(node.users) - {leave.node}):
            raise Unfit(f"{node} of {kind.path} is read from outside")
        for source in node.all_input_nodes:
            if source not in inside and source not in slots:
                name = str(source.target)
                constant = name not in own and name not in held
                if source.op != "get_attr" or not (constant or name in own):
                    raise Unfit(f"{kind.path} reads {source}, which is not its own")
                slots[source] = (name, True) if constant else (own[name], False)
    if not set(leave.values) <= set(computed):
        raise Unfit(f"{kind.path} returns one of its inputs")
    names = {node: name for node, (name, _) in slots.items()}
    graph = class_graph(computed, inputs, names, leave.values, kind.path)
    return _Class(graph, read, list(slots.values()))


def _first(
    enter: _Place, leave: _Place, made: _Class, owned: set[fx.Node], program: Program
) -> Occurrence:
    """Return where the block that ran stands."""
    path = enter.mark.kind.path
    picked = [leave.picked.get(index) for index in range(len(leave.values))]
    return Occurrence(
        path=path,
        anchor=enter.node,
        inputs=[enter.values[index] for index in made.read],
        results=[() if node is None else (node,) for node in picked],
        owned=owned,
        weights=made.weights(path, program),
    )


def _calls(
    places: Sequence[_Place], classes: Mapping[Kind, _Class], program: Program
) -> Iterator[tuple[Kind, Occurrence]]:
    """Return the calls that marks stand for, each once and after those it reads."""
    placed: set[Call] = set()
    read = {
        source
        for place in places
        for call in place.mark.calls
        for source in call.inputs
        if isinstance(source, Value)
    }
    for place in places:
        node_of = dict(zip(place.mark.leaves, place.values, strict=True))
        for call in place.mark.calls:
            if call in placed:
                continue
            placed.add(call)
            outputs = [Value(call, index) for index in range(len(call.kind.outputs))]
            results: list[list[Hashable]] = [[v] if v in read else [] for v in outputs]
            if call is place.mark.calls[-1]:
                for index, node in place.picked.items():
                    results[index].append(node)
            yield (
                call.kind,
                Occurrence(
                    path=call.path,
                    anchor=place.node,
                    inputs=[_source(call.inputs[i], node_of) for i in classes[call.kind].read],
                    results=results,
                    owned={place.node, *place.picked.values()},
                    weights=classes[call.kind].weights(call.path, program),
                ),
            )


def _source(source: Tensor | Value, node_of: Mapping[int, fx.Node]) -> Hashable:
    """Return what stands for the input of a call: a node of main or an output of a call."""
    if isinstance(source, Value):
        settled = source.call.settled
        known = None if settled is None else node_of.get(id(settled[source.position]))
        return source if known is None else known
    return node_of[id(source)]


def check_stamped(program: Program, press: Press, draw: random.Random) -> None:
    """Export one stamped block of each kind and compare it with its class, op by op.

    Raises:
        Unfit: They differ.
    """
    by_kind: dict[Kind, list[Call]] = {}
    for call in press.calls:
        if call.path in program.instances:
            by_kind.setdefault(call.kind, []).append(call)
    for kind, calls in by_kind.items():
        call = draw.choice(calls)
        ours = program.graphs[program.instances[call.path].block]
        if not any(_same_ops(flat, ours) for flat in _alone(call)):
            raise Unfit(f"{call.path} computes something else than {kind.path}")


def _alone(call: Call) -> Iterator[fx.Graph]:
    """Export one block; then as it looks in a model that writes into a tensor elsewhere."""
    from .exported import from_exported

    given = [Layout.of(x).zeros() if isinstance(x, Tensor) else x for x in call.kind.given.leaves]
    args, kwargs = pytree.tree_unflatten(given, call.kind.given.spec)
    exported = torch.export.export(call.block, args, kwargs, strict=False)
    yield from_exported(exported, fold=False).main
    yield from_exported(exported.run_decompositions({}), fold=False).main


def _same_ops(ours: fx.Graph, theirs: fx.Graph) -> bool:
    """Whether two graphs call the same ops with the same literals, apart from sizes."""
    pairs = zip(_ops(ours), _ops(theirs), strict=False)
    return len(_ops(ours)) == len(_ops(theirs)) and all(_same_op(a, b) for a, b in pairs)


def _same_op(ours: fx.Node, theirs: fx.Node) -> bool:
    a, b = (pytree.tree_leaves((node.args, node.kwargs)) for node in (ours, theirs))
    return ours.target is theirs.target and all(
        x == y for x, y in zip(a, b, strict=False) if _literal(x) and _literal(y)
    )


def _literal(value: object) -> bool:
    return isinstance(value, int | float | str | torch.dtype)


def _ops(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute tensors; the others compute sizes."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and not isinstance(node.meta["val"], torch.SymInt | int)
    ]


def _place(node: fx.Node, press: Press) -> _Place:
    picked = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return _Place(node, press.marks[int(node.args[1])], picked)  # type: ignore[arg-type]


def _canonical(program: Program, name: str) -> str:
    return program.aliases.get(name, name)


_MARK = torch.ops.blockwright.mark.default
