"""Everything a program is, as one number; and what it is apart from names."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.branches import branches_of, is_cond
from ..ir.graphs import copy_graph
from ..ir.program import MAIN, Instance, Program
from ..ir.serialize import to_json
from ..ir.shapes import describe


def snapshot(program: Program) -> str:
    """Hash graphs, names, provenance, signature and the bits of every tensor."""
    digest = hashlib.sha256(json.dumps(to_json(program), sort_keys=True).encode())
    for name, tensor in program.tensors.items():
        digest.update(name.encode() + bits(tensor))
    return digest.hexdigest()


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's elements as bytes, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def skeleton(program: Program) -> list[Any]:
    """Return what a program computes without saying how anything is called.

    Nodes are numbers, weights the hash of their bits, block classes numbered as they are called.
    """
    lines = _lines(program, MAIN, None)
    for name, instance in program.instances.items():
        lines.append([f"instance {name.count('.')}", *_lines(program, instance.block, name)])
    return lines


def _lines(program: Program, key: str, instance: str | None) -> list[Any]:
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in program.graphs[key].nodes:
        numbers[node] = f"%{len(numbers)}"
        what = str(node.target)
        if node.op == "get_attr":
            what = hashlib.sha256(bits(program.weight(what, instance))).hexdigest()[:12]
        elif node.op in ("placeholder", "call_module"):
            what = ""
        if is_cond(node):
            for branch in branches_of(node):
                lines += _lines(program, branch, instance)
        given = (node.args[0], node.args[3]) if is_cond(node) else node.args
        args = fx.node.map_arg((given, node.kwargs), numbers.__getitem__)
        lines.append((node.op, what, repr(args), repr(describe(node.meta.get("val")))))
    return lines


def renamed(program: Program) -> Program:
    """Return the program with every module and weight called something else."""

    def graph(old: fx.Graph) -> fx.Graph:
        new = copy_graph(old)
        for node in new.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = other_name(str(node.target))
            if "local_path" in node.meta:
                node.meta["local_path"] = other_name(node.meta["local_path"])
            stack = node.meta.get("nn_module_stack", {})
            moved = {k: (other_name(str(path)), kind) for k, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = moved
        return new

    def keys(table: Mapping[str, Any]) -> dict[str, Any]:
        return {other_name(name): value for name, value in table.items()}

    return program.with_(
        graphs={key: graph(old) for key, old in program.graphs.items()},
        instances={
            other_name(name): Instance(
                i.block, {other_name(s): other_name(w) for s, w in i.weights.items()}
            )
            for name, i in program.instances.items()
        },
        tensors=keys(program.tensors),
        aliases={name: other_name(held) for name, held in keys(program.aliases).items()},
        parameters=frozenset(map(other_name, program.parameters)),
    )


def scrambled(program: Program, seed: int) -> Program:
    """Return the program with every name in it replaced and the tensors in another order."""
    source = random.Random(seed)

    def name() -> str:
        return ".".join(f"n{source.getrandbits(24):x}" for _ in range(3))

    tensors = {old: name() for old in sorted(program.tensors, key=lambda _: source.random())}
    slots = {old: name() for i in program.instances.values() for old in i.weights}
    instances = {old: name() for old in program.instances}
    graphs, inside_main = {}, set(program.scope())
    for key, graph in program.graphs.items():
        graphs[key] = copy_graph(graph)
        for node in graphs[key].nodes:
            node.name = f"v{source.getrandbits(48):x}"
            node.meta = {"val": node.meta.get("val"), "local_path": name()}
            if node.op == "get_attr":
                node.target = (tensors if key in inside_main else slots)[str(node.target)]
            elif node.op == "call_module":
                node.target = instances[str(node.target)]
    return program.with_(
        graphs=graphs,
        tensors={new: program.tensors[old] for old, new in tensors.items()},
        parameters=frozenset(tensors[old] for old in program.parameters),
        instances={
            instances[key]: Instance(
                instance.block, {slots[s]: tensors[t] for s, t in instance.weights.items()}
            )
            for key, instance in program.instances.items()
        },
    )


def other_name(path: str) -> str:
    """Rename every part of a module path, one to one."""
    return re.sub(r"[^.]+", lambda part: f"z{part[0][::-1]}", path)
