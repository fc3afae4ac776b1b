"""A program as plain JSON and back, weights apart.

The JSON says what each node does, how the program is called, and where each node came from. It
does not hold shapes of inner values: reading runs every graph once on fake tensors, which finds
them again and checks the file on the way. Reading never imports, evaluates or calls anything but
the operations in `targets`. Where order means something there is a list, so keys may be sorted.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from .branches import complaint
from .errors import ArtefactError, BlockwrightError
from .graphs import module_path
from .literals import decode, encode
from .program import MAIN, Instance, Program, StateSlot
from .propagate import Values, describe_symbols, describe_value
from .signature_json import signature_from_json, signature_to_json
from .state import complaint as state_complaint
from .targets import resolve, target_name

_PASS_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def to_json(program: Program) -> dict[str, Any]:
    """Return a program without its weights as plain JSON.

    Raises:
        ArtefactError: An operation, argument or name in it has no form as data.
    """
    for name in (*program.tensors, *program.aliases, *program.instances):
        check_name(name)
    return {
        "graphs": [_graph_to_json(name, graph) for name, graph in program.graphs.items()],
        "instances": [
            {"name": name, "block": instance.block, "weights": dict(instance.weights)}
            for name, instance in program.instances.items()
        ],
        "symbols": describe_symbols(program),
        "signature": signature_to_json(program.signature),
        "tensors": [[name, *_tensor_type(tensor)] for name, tensor in program.tensors.items()],
        "aliases": dict(program.aliases),
        "parameters": sorted(program.parameters),
        "state": [_slot_to_json(slot) for slot in program.state],
        "notes": list(program.notes),
    }


def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    """Return the program `to_json` wrote.

    Args:
        data: Plain JSON, possibly from a stranger.
        tensors: The program's tensors by name.

    Raises:
        ArtefactError: The data is malformed or does not fit the tensors.
    """
    try:
        graphs = {str(graph["name"]): _graph_from_json(graph) for graph in data["graphs"]}
        program = Program(
            graphs=graphs,
            tensors=_checked_tensors(data["tensors"], tensors),
            signature=signature_from_json(data["signature"]),
            instances={
                check_name(item["name"]): Instance(str(item["block"]), dict(item["weights"]))
                for item in data["instances"]
            },
            aliases={check_name(name): str(target) for name, target in data["aliases"].items()},
            parameters=frozenset(data["parameters"]),
            state=tuple(_slot_from_json(*slot) for slot in data["state"]),
            notes=tuple(map(str, data["notes"])),
        )
        _check_references(program)
        inputs = {n["name"]: n["value"] for n in data["graphs"][0]["nodes"] if "value" in n}
        Values(data["symbols"]).fill(program, inputs)
        broken = state_complaint(program)
        if broken is not None:
            raise ArtefactError(f"the graph is malformed: {broken}.")
    except BlockwrightError:
        raise
    except Exception as error:  # a file may be malformed in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtefactError(f"the graph is malformed ({reason[:200]}).") from error
    return program


def check_name(name: str) -> str:
    """Return a tensor's or block's name if it is safe to use in generated code and in files.

    Raises:
        ArtefactError: It is not.
    """
    parts = name.split(".")
    if not (0 < len(name) <= 4096 and name.isprintable() and all(parts)) or set(name) & set(
        "\"'\\"
    ):
        raise ArtefactError(
            f"{name[:80]!r} is not a name that an artefact may hold.",
            remedy="use printable names without quotes and backslashes, parts joined by dots.",
        )
    return name


def _slot_to_json(slot: StateSlot) -> list[Any]:
    """Return a slot as data; what it may tell of is left out where it tells of nothing."""
    told = [list(slot.faults), slot.warning] if slot.faults or slot.warning else []
    return [slot.name, slot.input, slot.output, *told]


def _slot_from_json(
    name: str, place: str, output: int, faults: Iterable[str] = (), warning: str = ""
) -> StateSlot:
    return StateSlot(name, str(place), int(output), tuple(map(str, faults)), str(warning))


def _graph_to_json(name: str, graph: fx.Graph) -> dict[str, Any]:
    return {"name": name, "nodes": [_node_to_json(node, name == MAIN) for node in graph.nodes]}


def _node_to_json(node: fx.Node, main: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op != "output":
        data["target"] = target_name(node.target) if node.op == "call_function" else node.target
    if node.args:
        data["args"] = [encode(argument) for argument in node.args]
    if node.kwargs:
        data["kwargs"] = [[key, encode(value)] for key, value in node.kwargs.items()]
    if node.op == "placeholder" and main:
        data["value"] = describe_value(node.meta["val"])
    if module_path(node):
        data["path"] = module_path(node)
    if "local_path" in node.meta:
        data["local_path"] = node.meta["local_path"]
    passes = [name for name in _sources(node.meta.get("from_node")) if _PASS_NAME.fullmatch(name)]
    if passes:
        data["passes"] = passes
    return data


def _sources(chain: Iterable[NodeSource] | None) -> list[str]:
    """Name the passes that made a node, oldest first."""
    return [name for s in chain or () for name in (*_sources(s.from_node), s.pass_name)]


def _graph_from_json(data: Mapping[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        if item["name"] in nodes:
            raise ArtefactError(f"two nodes are called {item['name']!r}.")
        nodes[item["name"]] = _node_from_json(graph, item, nodes)
    graph.lint()
    return graph


def _node_from_json(
    graph: fx.Graph, data: Mapping[str, Any], nodes: Mapping[str, fx.Node]
) -> fx.Node:
    op, name = data["op"], _identifier(data["name"])
    args = tuple(decode(argument, nodes) for argument in data.get("args", ()))
    kwargs = {_identifier(key): decode(value, nodes) for key, value in data.get("kwargs", ())}
    node = graph.create_node(op, _target(op, data.get("target")), args, kwargs, name)
    if path := data.get("path"):
        node.meta["nn_module_stack"] = {path: (str(path), "")}
    if "local_path" in data:
        node.meta["local_path"] = str(data["local_path"])
    if "passes" in data:
        node.meta["from_node"] = [
            NodeSource(None, str(by), NodeSourceAction.REPLACE) for by in data["passes"]
        ]
    return node


def _target(op: str, target: Any) -> Any:
    """Return what a node of kind `op` may have as its target. FX puts it into generated code."""
    if op == "call_function":
        return resolve(target)
    if op in ("get_attr", "call_module"):
        return check_name(target)
    if op == "placeholder":
        return _identifier(target)
    if op == "output" and target is None:
        return "output"
    raise ArtefactError(f"the graph has a node of an unknown kind, {str(op)[:40]!r}.")


def _identifier(name: str) -> str:
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ArtefactError(f"{name[:80]!r} is not a name of a value.")
    return name


def _tensor_type(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _checked_tensors(
    expected: Iterable[tuple[str, str, list[int]]], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors in the program's order."""
    types = {check_name(name): (dtype, shape) for name, dtype, shape in expected}
    for name in types.keys() ^ given.keys():
        holder = "weights" if name in types else "graph"
        raise ArtefactError(f"the {holder} lack the tensor {name[:200]!r}.")
    for name, tensor in given.items():
        if types[name] != _tensor_type(tensor):
            wanted = " ".join(map(str, types[name]))
            found = " ".join(map(str, _tensor_type(tensor)))
            raise ArtefactError(f"tensor {name!r} is {found}; the graph takes {wanted}.")
    return {name: given[name] for name in types}


def _check_references(program: Program) -> None:
    """Refuse names that name nothing."""
    known = set(program.tensors)
    found = complaint(program.graphs, {MAIN, *(i.block for i in program.instances.values())})
    if found is not None:
        raise ArtefactError(f"the graph is malformed: {found[0]}.")
    inside_main = set(program.scope())
    for name, graph in program.graphs.items():
        inside = name in inside_main
        for node in graph.nodes:
            if node.op == "call_module" and not (inside and node.target in program.instances):
                raise ArtefactError(f"the graph calls a block it lacks, {node.target!r}.")
            if node.op == "get_attr" and inside and node.target not in known:
                raise ArtefactError(f"the graph reads a tensor it lacks, {node.target!r}.")
    called = {str(node.target) for node in program.calls()}
    for name, instance in program.instances.items():
        nodes = (n for key in program.scope(name) for n in program.graphs[key].nodes)
        slots = {str(node.target) for node in nodes if node.op == "get_attr"}
        if slots != instance.weights.keys() or not known.issuperset(instance.weights.values()):
            raise ArtefactError("the weights of a block do not fit its graph.", where=name)
        if name not in called or instance.block == MAIN:
            raise ArtefactError("a block is never called.", where=name)
    inputs = {node.name for node in program.main.nodes if node.op == "placeholder"}
    fed = [spec.name for spec in program.signature.inputs] + [s.input for s in program.state]
    references = {*program.aliases.values(), *program.parameters, *(s.name for s in program.state)}
    if not references <= known or sorted(fed) != sorted(inputs):
        raise ArtefactError("the signature does not fit the graph.")
