"""Check what must hold of every program, after capture and after every pass.

Graphs do not change once they are in a Program, so a graph found sound stays sound: only new
graphs are looked at, and what an op does to shapes is derived once per op and argument shapes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .branches import branches_of, choices, complaint, is_cond, operands_of
from .errors import VerifyError
from .graphs import output_nodes, place_of, remembered
from .program import MAIN, Program
from .regions import local_path
from .shapes import describe, fake_mode
from .state import complaint as state_complaint

_LITERALS = (
    int, float, bool, str, complex, type(None),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def verify(program: Program, *, by: str = "capture") -> None:
    """Check the invariants of a program.

    Args:
        program: What to check.
        by: What made it, named in errors.

    Raises:
        VerifyError: An invariant is broken; the message names node and module path.
    """
    for key, graph in program.graphs.items():
        remembered(graph, verify, partial(_check_graph, key=key, by=by))
    _check_choices(program, by)
    _check_signature(program, by)
    _check_calls(program, by)
    _check_weights(program, by)


def _check_graph(graph: fx.Graph, key: str, by: str) -> bool:
    check_order(graph, key, by)
    check_shapes(graph, key, by)
    return True


def check_order(graph: fx.Graph, key: str, by: str) -> None:
    """Check names, topological order, use lists and literal arguments of a graph."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            raise _error(by, f"two nodes are called {node.name}", key, node)
        names.add(node.name)
        for source in node.all_input_nodes:
            if source not in seen:
                raise _error(
                    by, f"{node.name} reads {source.name} before it is computed", key, node
                )
            if node not in source.users:
                raise _error(by, f"{source.name} does not list {node.name} as user", key, node)
        for user in node.users:
            if node not in user.all_input_nodes:
                raise _error(
                    by, f"{node.name} lists {user.name}, which does not read it", key, node
                )
        _check_literals(node, (node.args, node.kwargs), key, by)
        seen.add(node)
    stray = [user for node in graph.nodes for user in node.users if user not in seen]
    if stray:
        raise _error(by, f"{stray[0].name} reads the graph from outside", key, stray[0])


def check_shapes(graph: fx.Graph, key: str, by: str) -> None:
    """Derive every value's shape and type again and compare them with what is recorded."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        recorded = node.meta.get("val")
        if node.op == "output":
            continue
        if recorded is None:
            raise _error(by, f"{node.name} records no shape", key, node)
        values[node] = recorded
        if node.op != "call_function" or is_cond(node):
            continue
        try:
            values[node] = derive(node, values, fake_mode(graph))
        except Exception as error:
            raise _error(by, f"{node.name} cannot run: {error}", key, node) from error
        if describe(values[node]) != describe(recorded):
            raise _error(
                by,
                f"{node.name} is recorded as {describe(recorded)} and gives"
                f" {describe(values[node])}",
                key,
                node,
            )


def derive(node: fx.Node, values: Mapping[fx.Node, Any], mode: FakeTensorMode) -> Any:
    """Run a node on fake values of a mode; remember the answer by op and arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    derived: dict[Any, Any] = mode.__dict__.setdefault("_derived", {})
    key = (node.target, _layout(args), _layout(kwargs))
    if key not in derived:
        assert callable(node.target)
        with mode, torch.no_grad(), _unsettled(mode):
            derived[key] = node.target(*args, **kwargs)
    return derived[key]


def _unsettled(mode: FakeTensorMode) -> contextlib.AbstractContextManager[None]:
    """Ask about sizes without settling them: a check may not narrow what a program accepts."""
    env = mode.shape_env
    return contextlib.nullcontext() if env is None else env.suppress_guards()


def _layout(value: Any) -> Any:
    """Everything about an argument that a shape rule may look at, hashable."""
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout == torch.strided else ()
        return ("tensor", describe(value), tuple(map(describe, stride)))
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    if isinstance(value, Mapping):
        return tuple((name, _layout(item)) for name, item in value.items())
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
    return describe(value) if symbolic else (type(value).__name__, str(value))


def _check_choices(program: Program, by: str) -> None:
    """Check that branches exist, have one caller, and take and give what the choice says."""
    found = complaint(program.graphs, {MAIN, *(i.block for i in program.instances.values())})
    if found is not None:
        what, at = found
        raise _error(by, what, "", at) if at else VerifyError(f"{by} left a broken graph: {what}.")
    for key, graph in program.graphs.items():
        for node in choices(graph):
            predicate: Any = node.args[0]
            if predicate.meta["val"].dtype != torch.bool or predicate.meta["val"].numel() != 1:
                raise _error(by, f"{node.name} does not ask one true or false", key, node)
            takes = [describe(operand.meta["val"]) for operand in operands_of(node)]
            gives = list(map(describe, node.meta["val"]))
            for branch in map(program.graphs.__getitem__, branches_of(node)):
                if _interface(branch).inputs != takes:
                    raise _error(by, f"a branch of {node.name} takes other values", key, node)
                if _interface(branch).outputs != gives:
                    raise _error(by, f"a branch of {node.name} gives other values", key, node)


def _check_signature(program: Program, by: str) -> None:
    inputs = [node.name for node in program.main.nodes if node.op == "placeholder"]
    expected = {spec.name for spec in program.signature.inputs}
    expected |= {slot.input for slot in program.state}
    if set(inputs) != expected:
        raise VerifyError(
            f"{by} changed the inputs from {sorted(expected)} to {sorted(inputs)}.",
            remedy="keep the placeholders of the main graph.",
        )
    count = program.signature.outputs.leaves - len(program.signature.constants)
    found = len(output_nodes(program.main))
    if found != count + len(program.state):
        raise VerifyError(f"{by} changed the number of outputs from {count} to {found}.")
    broken = state_complaint(program)
    if broken is not None:
        raise VerifyError(f"{by} left broken state: {broken}.")


def _check_calls(program: Program, by: str) -> None:
    """Check that calls and classes agree about what goes in and out."""
    called: set[str] = set()
    found = (remembered(program.graphs[key], _calls, _calls) for key in program.scope())
    for call, takes, gives in itertools.chain.from_iterable(found):
        name = str(call.target)
        instance = program.instances.get(name)
        if instance is None or instance.block not in program.graphs:
            raise _error(by, f"{name} is called and is no block instance", MAIN, call)
        if name in called:
            raise _error(by, f"{name} is called twice", MAIN, call)
        called.add(name)
        interface = _interface(program.graphs[instance.block])
        if takes != interface.inputs:
            raise _error(by, f"{name} is called with other values than it takes", MAIN, call)
        if gives != interface.outputs:
            raise _error(by, f"{name} returns other values than recorded", MAIN, call)
    lost = program.instances.keys() - called
    if lost:
        raise VerifyError(f"{by} left instances that nobody calls: {sorted(lost)}.")


def _check_weights(program: Program, by: str) -> None:
    """Check that every slot holds a tensor of its shape, and that no tensor is held twice."""
    tensors = program.tensors
    for key in program.scope():
        main = _interface(program.graphs[key])
        _check_slots(tensors, {slot: slot for slot in main.slots}, main, key, by)
    for name, instance in program.instances.items():
        interfaces = [_interface(program.graphs[key]) for key in program.scope(name)]
        slots = {slot for interface in interfaces for slot in interface.slots}
        if len(slots) != len(instance.weights):
            surplus = instance.weights.keys() ^ slots
            raise VerifyError(f"{by} left slots {sorted(surplus)} unmatched.", where=name)
        for interface in interfaces:
            _check_slots(tensors, instance.weights, interface, name, by)
    _check_ties(tensors, by)


def _check_slots(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, str],
    interface: _Interface,
    where: str,
    by: str,
) -> None:
    try:  # one comparison when all is well, which is nearly always
        found = [(t.shape, t.dtype) for t in (tensors[weights[s]] for s in interface.slots)]
        if found == interface.kinds:
            return
    except KeyError:
        pass
    for (slot, node), (shape, dtype) in zip(interface.slots.items(), interface.kinds, strict=True):
        name = weights.get(slot, "")
        tensor = tensors.get(name)
        if tensor is None:
            what = f"{node.name} names the tensor {name!r}, which does not exist"
            raise _error(by, what, where, node)
        if tensor.shape != shape or tensor.dtype != dtype:
            what = f"{name} is {list(tensor.shape)}, its slot is {list(shape)}"
            raise _error(by, what, where, node)


def _check_ties(tensors: Mapping[str, Tensor], by: str) -> None:
    if len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors):
        return
    holders: dict[object, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel():
            continue  # nothing stored, nothing shared
        other = holders.setdefault(place_of(tensor), name)
        if other != name:
            raise VerifyError(f"{by} untied {name} and {other}, which share memory.")


@dataclass(frozen=True)
class _Interface:
    """What a graph takes and gives, and the weights it reads with their shapes and types."""

    inputs: list[Any]
    outputs: list[Any]
    slots: dict[str, fx.Node]
    kinds: list[tuple[tuple[int, ...], torch.dtype]]


def _interface(graph: fx.Graph) -> _Interface:
    return remembered(graph, _Interface, _read_interface)


def _read_interface(graph: fx.Graph) -> _Interface:
    slots = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    values = [node.meta["val"] for node in slots.values()]
    return _Interface(
        [describe(n.meta["val"]) for n in graph.nodes if n.op == "placeholder"],
        [describe(n.meta["val"]) for n in output_nodes(graph)],
        slots,
        [(tuple(value.shape), value.dtype) for value in values],
    )


def _calls(main: fx.Graph) -> list[tuple[fx.Node, list[Any], list[Any]]]:
    """Return every call with what it passes and what it is recorded to return."""
    return [
        (n, [describe(a.meta["val"]) for a in n.args], list(map(describe, n.meta["val"])))
        for n in main.nodes
        if n.op == "call_module"
    ]


def _check_literals(node: fx.Node, value: Any, key: str, by: str) -> None:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            _check_literals(node, item, key, by)
    elif isinstance(value, slice):
        _check_literals(node, (value.start, value.stop, value.step), key, by)
    elif not isinstance(value, (fx.Node, *_LITERALS)):
        raise _error(by, f"{node.name} holds a {type(value).__name__}, which is no data", key, node)


def _error(by: str, what: str, key: str, node: fx.Node) -> VerifyError:
    place = ".".join(part for part in (key, local_path(node)) if part)
    return VerifyError(f"{by} left a broken graph: {what}.", where=f"{place} (node {node.name})")
