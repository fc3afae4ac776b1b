"""From `torch.export` to a Program: weights by their names, no noise, repeated blocks folded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    CustomObjArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from .branches import is_cond, scope
from .copied import copy_computation, wrapped
from .errors import CaptureError
from .fold import fold_blocks
from .graphs import copy_graph, is_mutable, place_of, remove_dead
from .program import MAIN, Program, StateSlot
from .shapes import dims
from .signature import Argument, Signature, TensorSpec
from .structure import Structure


def from_exported(
    exported: ExportedProgram,
    *,
    fold: bool = True,
    notes: tuple[str, ...] = (),
    parameters: tuple[str, ...] = (),
    symbols: Mapping[tuple[str, int], str] | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Program:
    """Turn an exported program into a Program.

    Args:
        exported: What `torch.export.export` returned.
        fold: Share one graph among repeated blocks.
        notes: Remarks to carry into the report.
        parameters: Names that `forward` accepts by position.
        symbols: Name of a dynamic dimension by flat input name and axis.
        held: Every tensor of the model by every name, ties included.
    """
    exported = functional(exported)
    tensors, canonical = _tensors(exported, held or {})
    graphs, state = _graphs(exported, canonical)
    graph = graphs[MAIN]
    signature = _signature(exported, graph, parameters, symbols or {})
    kinds = {name for name, value in (held or {}).items() if isinstance(value, nn.Parameter)}
    kinds |= set(exported.graph_signature.parameters)
    program = Program(
        graphs=graphs,
        tensors=tensors,
        signature=signature,
        aliases={name: target for name, target in canonical.items() if name != target},
        parameters=frozenset(canonical[name] for name in kinds if name in canonical),
        state=tuple(state),
        notes=notes + tuple(note for each in graphs.values() for note in _randomness(each)),
    )
    return fold_blocks(program) if fold else program


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with every write turned into a new value."""
    if not any(is_mutable(node) for node in exported.graph.nodes):
        return exported
    try:
        return exported.run_decompositions({})
    except Exception as error:  # torch asserts what it cannot do
        raise CaptureError(
            "a tensor that the model writes into cannot be made a value of its own.",
            remedy="give a written buffer one name, and let no other buffer be a view of it.",
        ) from error


def without_unread(program: Program) -> Program:
    """Leave out tensors that no output depends on, and say so."""
    unread = program.unused_tensors()
    if not unread:
        return program
    listed = ", ".join(sorted(unread)[:3]) + (", ..." if len(unread) > 3 else "")
    note = f"left out {len(unread)} tensors that no output depends on: {listed}"
    return program.with_(
        tensors={name: value for name, value in program.tensors.items() if name not in unread},
        parameters=program.parameters - unread,
        aliases={alias: name for alias, name in program.aliases.items() if name not in unread},
        notes=(*program.notes, note),
    )


def _tensors(
    exported: ExportedProgram, held: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by canonical name, and the canonical name of every name."""
    stored: dict[str, Any] = {**held}
    for name, value in {**exported.state_dict, **exported.constants}.items():
        stored.setdefault(name, value)
    canonical: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    for name, value in stored.items():
        if not isinstance(value, Tensor):
            raise CaptureError(f"constant {name!r} is a {type(value).__name__}, not a tensor.")
        key = place_of(value)
        canonical[name] = seen.setdefault(key, name)
        if canonical[name] == name:
            tensors[name] = value.detach()
    return tensors, canonical


def _graphs(
    exported: ExportedProgram, canonical: Mapping[str, str]
) -> tuple[dict[str, fx.Graph], list[StateSlot]]:
    """Rebuild the exported graph and its branches, weights as `get_attr` nodes and no noise."""
    signature = exported.graph_signature
    held = {
        spec.arg.name: str(spec.target)
        for spec in signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    mutated = {
        str(spec.target): index
        for index, spec in enumerate(signature.output_specs)
        if spec.kind == OutputKind.BUFFER_MUTATION
    }
    _reject_unsupported(exported)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    weights: dict[str, fx.Node] = {}
    arguments = [node for node in exported.graph.nodes if node.op == "placeholder"]
    # The caller's inputs come first, then state; weights become `get_attr` nodes.
    for node in sorted(arguments, key=lambda node: node.name in held):
        target = held.get(node.name)
        if target is None or target in mutated:
            if isinstance(node.meta.get("val"), Tensor):
                env[node] = graph.node_copy(node)
        else:
            name = canonical[target]
            if name not in weights:
                weights[name] = graph.get_attr(name)
                weights[name].meta = dict(node.meta)
            env[node] = weights[name]
    graphs = {MAIN: graph}
    copy_computation(exported.graph_module, graph, env, graphs, MAIN)
    results = exported.graph.output_node().args[0]
    by_name = {node.name: env[node] for node in results if isinstance(node, fx.Node)}
    user = [by_name[name] for name in _user_outputs(exported)]
    updates = [env[results[index]] for index in mutated.values()]
    graph.output((*user, *updates))
    placeholder_of = {held[node.name]: env[node].name for node in arguments if node.name in held}
    state = [
        StateSlot(canonical[target], placeholder_of[target], len(user) + position)
        for position, target in enumerate(mutated)
    ]
    remove_dead(graph)
    graphs = {key: copy_graph(each) for key, each in graphs.items()}
    return {key: graphs[key] for key in scope(graphs, MAIN)}, state


def _signature(
    exported: ExportedProgram,
    graph: fx.Graph,
    parameters: tuple[str, ...],
    symbols: Mapping[tuple[str, int], str],
) -> Signature:
    spec = exported.call_spec.in_spec
    assert spec is not None
    assert exported.call_spec.out_spec is not None
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    user = [s.arg for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    renamed = {
        str(inputs[name].meta["val"].shape[axis]): label
        for (path, axis), label in symbols.items()
        if (index := _leaf_index(spec, path)) is not None and (name := user[index].name) in inputs
    }
    leaves: list[Any] = [
        _tensor_spec(inputs[arg.name], renamed)
        if isinstance(arg, TensorArgument)
        else getattr(arg, "value", None)
        for arg in user
    ]
    positional, keyword = spec.children()
    arguments: list[Argument] = []
    children = [(None, child) for child in positional.children()]
    children += list(zip(keyword.context, keyword.children(), strict=True))
    for index, (name, child) in enumerate(children):
        structure = Structure.from_spec(child)
        taken, leaves = leaves[: structure.leaves], leaves[structure.leaves :]
        label = name or (parameters[index] if index < len(parameters) else f"args.{index}")
        arguments.append(Argument(label, name is None, structure, tuple(taken)))
    outputs = [s for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    ranges = {
        renamed.get(str(symbol), str(symbol)): (
            max(int(limits.lower), 0),
            None if limits.upper > 2**60 else int(limits.upper),
        )
        for symbol, limits in exported.range_constraints.items()
        if re.fullmatch(r"[su]\d+", str(symbol))
    }
    return Signature(
        arguments=tuple(arguments),
        outputs=Structure.from_spec(exported.call_spec.out_spec),
        constants={
            index: s.arg.value
            for index, s in enumerate(outputs)
            if isinstance(s.arg, ConstantArgument)
        },
        parameters=parameters,
        ranges=ranges,
        symbols=renamed,
    )


def _tensor_spec(node: fx.Node, symbols: Mapping[str, str]) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(node.name, value.dtype, dims(value, symbols))


def _user_outputs(exported: ExportedProgram) -> list[str]:
    return [
        spec.arg.name
        for spec in exported.graph_signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT and not isinstance(spec.arg, ConstantArgument)
    ]


def _reject_unsupported(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.BUFFER_MUTATION):
            what = "input" if spec.kind == OutputKind.USER_INPUT_MUTATION else "parameter"
            raise CaptureError(
                f"the model writes into its {what} {spec.target!r}.",
                remedy="clone it before changing it, or make a parameter that changes a buffer.",
            )
    for item in exported.graph_signature.input_specs:
        if isinstance(item.arg, CustomObjArgument):
            raise CaptureError(f"the model holds a script object, {item.target!r}.")
    for node in exported.graph.nodes:
        if node.op == "get_attr" and not all(wrapped(u) or is_cond(u) for u in node.users):
            raise CaptureError(
                f"control flow ({next(iter(node.users)).target}) is not supported in capture yet.",
                where=node.name,
                remedy="use torch.cond or torch.where, or write the loop out.",
            )


def _randomness(graph: fx.Graph) -> tuple[str, ...]:
    seeded = torch.Tag.nondeterministic_seeded
    return tuple(
        f"{node.target} draws random numbers; two calls differ."
        for node in graph.nodes
        if seeded in getattr(node.target, "tags", ())
        and node.target.namespace == "aten"
        and "attention" not in str(node.target)
    )


def _leaf_index(spec: pytree.TreeSpec, path: str) -> int | None:
    """Find the flat index of the input a dotted path names; `#0` is the first positional.

    A size of one of `*args` has a path of its own and keeps the name torch gave it.
    """
    positional, keyword = (Structure.from_spec(child) for child in spec.children())
    paths = [f"#{p}" for p in positional.paths()] + keyword.paths()
    return paths.index(path) if path in paths else None
