"""A program as text that reads as Python, keeps its names under unrelated edits, and diffs well.

Values are named after the module they come from, weights by their path, and every line says type
and shape. Each block class stands once, with the instances it serves.
"""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from .branches import branches_of, is_cond, operands_of
from .graphs import output_nodes
from .program import MAIN, Program
from .regions import local_path
from .shapes import dim, dims

_TYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_WIDTH = 72  # column of the type comment


def program_text(program: Program) -> str:
    """Return the whole program as text."""
    parts = [_graph_text(program, MAIN)]
    parts += [_graph_text(program, key) for key in _classes(program)]
    return "\n\n".join(parts) + "\n"


def diff_text(
    old: Program,
    new: Program,
    names: tuple[str, str] = ("old", "new"),
    pairs: Mapping[str, str] | None = None,
) -> str:
    """Return a unified diff of two programs' texts, class by class; empty when they agree.

    A class of the old program is compared with each class of the new one that serves one of its
    instances, so a class that was split or renamed shows its changes and nothing else.

    Args:
        old: One program.
        new: Another.
        names: What the headers call them.
        pairs: Instance of the new program by the instance of the old one it stands for; those of
            one name when left out.
    """
    known = {n: n for n in old.instances if n in new.instances} if pairs is None else pairs
    served: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for a, b in known.items():
        served.setdefault((old.instances[a].block, new.instances[b].block), []).append((a, b))
    sections = [_diff(_lines(old, MAIN), _lines(new, MAIN), names, (MAIN, MAIN))]
    for (before, after), shared in served.items():
        titles = tuple(_range([pair[side] for pair in shared]) for side in (0, 1))
        texts = _lines(old, before), _lines(new, after, called=before)
        sections.append(_diff(*texts, names, (titles[0], titles[1])))
    for key in _only_in(old, {a for a, _ in served}):
        title = _range(old.instances_of(key))
        sections.append(_diff(_lines(old, key), [], names, (title, title)))
    for key in _only_in(new, {b for _, b in served}):
        title = _range(new.instances_of(key))
        sections.append(_diff([], _lines(new, key), names, (title, title)))
    return "\n".join(filter(None, sections))


def _only_in(program: Program, matched: set[str]) -> list[str]:
    return [key for key in _classes(program) if key not in matched]


def _classes(program: Program) -> list[str]:
    """Return the keys of block classes; branches stand where they are chosen."""
    return sorted({instance.block for instance in program.instances.values()})


def _diff(
    old: Sequence[str], new: Sequence[str], names: tuple[str, str], titles: tuple[str, str]
) -> str:
    before, after = (f"{name} {title}" for name, title in zip(names, titles, strict=True))
    return "\n".join(difflib.unified_diff(old, new, before, after, lineterm="", n=2))


def _range(instances: Sequence[str]) -> str:
    ends = instances[0] if len(instances) == 1 else f"{instances[0]} .. {instances[-1]}"
    return f"{len(instances)} x {ends}"


def _graph_text(program: Program, key: str) -> str:
    header = [] if key == MAIN else [f"# {_range(program.instances_of(key))}"]
    return "\n".join(header + _lines(program, key))


def _lines(program: Program, key: str, *, called: str | None = None) -> list[str]:
    """Return a graph as lines, perhaps under another name."""
    graph, symbols = program.graphs[key], program.signature.symbols
    names = value_names(graph, symbols)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    lines = [f"def {called or key}({', '.join(names[node] for node in inputs)}):"]
    lines += [_line(f"    # {names[n]}:", _kind(n.meta.get("val"), symbols)) for n in inputs]
    lines += _body(program, graph, names, "    ")
    lines.append(f"    return {', '.join(names[node] for node in output_nodes(graph))}")
    return lines


def _body(
    program: Program, graph: fx.Graph, names: Mapping[fx.Node, str], indent: str
) -> list[str]:
    """Return what a graph computes, line by line."""
    lines = []
    for node in graph.nodes:
        if is_cond(node):
            lines += _choice(program, node, names, indent)
        elif node.op in ("call_function", "call_module"):
            text = f"{indent}{names[node]} = {_call(program, node, names)}"
            lines.append(_line(text, _kind(node.meta.get("val"), program.signature.symbols)))
    return lines


def _choice(
    program: Program, node: fx.Node, names: Mapping[fx.Node, str], indent: str
) -> list[str]:
    """Return a choice as `if` and `else`, each of which sets the same names."""
    lines = []
    heads = f"if {_text(node.args[0], names)}", "else"
    for key, head in zip(branches_of(node), heads, strict=True):
        graph = program.graphs[key]
        places = [n for n in graph.nodes if n.op == "placeholder"]
        given = {p: names[o] for p, o in zip(places, operands_of(node), strict=True)}
        inner = value_names(graph, program.signature.symbols, given, set(names.values()))
        results = ", ".join(inner[n] for n in output_nodes(graph))
        lines.append(f"{indent}{head}:")
        lines += _body(program, graph, inner, f"{indent}    ")
        text = f"{indent}    {names[node]} = [{results}]"
        lines.append(_line(text, _kind(node.meta.get("val"), program.signature.symbols)))
    return lines


def value_names(
    graph: fx.Graph,
    symbols: Mapping[str, str],
    given: Mapping[fx.Node, str] = MappingProxyType({}),
    taken: Collection[str] = (),
) -> dict[fx.Node, str]:
    """Name every value after its module; weights by their slot, sizes by their symbol.

    Args:
        graph: What computes the values.
        symbols: Name shown for a symbol.
        given: Names of placeholders that are not to be called by their own.
        taken: Names that values of other graphs have.
    """
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
    per_path = Counter(local_path(node) for node in nodes)
    used: Counter[str] = Counter(taken)
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "placeholder":
            names[node] = given.get(node, node.name)
            used[names[node]] += 1
        elif node.op != "output":
            path, value = local_path(node), node.meta.get("val")
            last = path.rpartition(".")[2].replace("#", "_")
            alone = per_path[path] == 1 and not last.isdigit()
            base = last if last and alone else "_".join(filter(None, (last, _op(node))))
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                base = str(dim(value, symbols))
            base = f"v_{base}" if base[0].isdigit() else base
            used[base] += 1
            names[node] = base if used[base] == 1 else f"{base}_{used[base] - 1}"
    return names


def _call(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.target is operator.getitem:
        return f"{_text(node.args[0], names)}[{_text(node.args[1], names)}]"
    arguments = [_text(value, names) for value in node.args]
    arguments += [f"{name}={_text(value, names)}" for name, value in node.kwargs.items()]
    if node.op == "call_module":
        name = str(node.target)
        return f"{program.instances[name].block}[{name}]({', '.join(arguments)})"
    return f"{_op(node)}({', '.join(arguments)})"


def _op(node: fx.Node) -> str:
    if node.op == "call_module":
        return "call"
    target: Any = node.target
    name = target._schema.name if hasattr(target, "_schema") else target.__name__
    return str(name).rpartition("::")[2]


def _text(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(item, names) for item in value)}]"
    return str(value).removeprefix("torch.")


def _kind(value: Any, symbols: Mapping[str, str]) -> str:
    if isinstance(value, Tensor):
        shape = ", ".join(map(str, dims(value, symbols)))
        return f"{_TYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(value, torch.SymInt):
        return str(dim(value, symbols))
    if isinstance(value, Sequence):
        return ", ".join(_kind(item, symbols) for item in value)
    return ""


def _line(text: str, comment: str) -> str:
    return f"{text:<{_WIDTH}}  # {comment}" if comment else text
