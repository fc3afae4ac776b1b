"""Let the caller say how many experts tokens visit.

    program = dynamic_experts(program)                    one more argument: `visits`, int64 [k]
    engine(x, visits=torch.zeros(2, dtype=torch.int64))   of which the length counts: top-2

The number is a size, like that of a batch: nothing is compiled again for another one, and experts
that are not visited are not computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.graphs import aten, copy_graph
from ...ir.program import MAIN, Program
from ...ir.propagate import Values, describe_symbols, describe_value
from ...ir.recognize import Experts
from ...ir.recognize.calls import op, peel
from ...ir.regions import find_once
from ...ir.signature import Argument, Signature, TensorSpec
from ...ir.structure import Structure

NAME = "visits"


def dynamic_experts(program: Program) -> Program:
    """Return a program that is told with every call how many experts a token visits.

    Args:
        program: A program with networks in experts, all with the same number active.

    Raises:
        OptionError: There are none, or it has an argument of that name already.
    """
    graphs = {key: copy_graph(graph) for key, graph in program.graphs.items()}
    choices = {key: _choices(program.graphs[key], graph) for key, graph in graphs.items()}
    if not any(choices.values()):
        raise OptionError("the program has no feed-forward network in experts.")
    if any(argument.name == NAME for argument in program.signature.arguments):
        raise OptionError(f"the program has an argument {NAME!r} already.")
    given = {
        key: _told(graph, choices[key]) for key, graph in graphs.items()
        if choices[key] or key == MAIN
    }  # fmt: skip
    for call in [node for node in graphs[MAIN].nodes if node.op == "call_module"]:
        if program.instances[str(call.target)].block in given:
            call.args = (*call.args, given[MAIN])
    tops = [node for nodes in choices.values() for node in nodes]
    most = min(int(node.args[0].meta["val"].shape[-1]) for node in tops)  # type: ignore[union-attr]
    symbols = describe_symbols(program)
    symbol = f"s{max((int(name[1:]) for name in symbols), default=0) + 1}"
    inputs = {n.name: describe_value(n.meta["val"]) for n in program.main.nodes
              if n.op == "placeholder"}  # fmt: skip
    inputs[given[MAIN].name] = {"dtype": "int64", "device": _device(program), "shape": [symbol]}
    new = program.with_(graphs=graphs, signature=_signature(program, given[MAIN], symbol, most))
    Values({**symbols, symbol: [min(2, most), 0, most]}).fill(new, inputs)
    return new


def _choices(old: fx.Graph, graph: fx.Graph) -> list[fx.Node]:
    """Return where experts are chosen, in the copy of a graph."""
    names = {peel(region.index).name for region in find_once(old, Experts)}
    return [node for node in graph.nodes if node.name in names and op(node) == "topk"]


def _told(graph: fx.Graph, choices: list[fx.Node]) -> fx.Node:
    """Give a graph the argument, and its choices that many experts; return the argument."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        given = graph.placeholder(NAME)
    given.meta = {}
    if choices:
        with graph.inserting_before(choices[0]):
            count = graph.call_function(aten.sym_size.int, (given, 0))
        for node in choices:
            node.args = (node.args[0], count, *node.args[2:])
    return given


def _signature(program: Program, given: fx.Node, symbol: str, most: int) -> Signature:
    old = program.signature
    spec = TensorSpec(given.name, torch.int64, (NAME,))
    argument = Argument(NAME, positional=False, structure=Structure.of(0), leaves=(spec,))
    return replace(
        old,
        arguments=(*old.arguments, argument),
        ranges={**old.ranges, NAME: (0, most)},
        symbols={**old.symbols, symbol: NAME},
    )


def _device(program: Program) -> str:
    values = [n.meta["val"] for n in program.main.nodes if n.op == "placeholder"]
    return str(next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu")))
