"""The verifier rejects corrupted programs, each for its own reason, and changes nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from blockwright.ir.errors import VerifyError
from blockwright.ir.graphs import aten, copy_graph
from blockwright.ir.program import MAIN, Instance, Program
from blockwright.ir.verify import verify

Corruption = Callable[[Program], Program]


def edited(program: Program, key: str, edit: Callable[[fx.Graph], None]) -> Program:
    graph = copy_graph(program.graphs[key])
    edit(graph)
    return program.with_(graphs={**program.graphs, key: graph})


def find(graph: fx.Graph, target: object, index: int = 0) -> fx.Node:
    return [node for node in graph.nodes if node.target == target][index]


def order(graph: fx.Graph) -> None:
    first, last = find(graph, aten.linear.default), find(graph, aten.gelu.default)
    last.append(first)


def name(graph: fx.Graph) -> None:
    find(graph, aten.linear.default, 1)._rename("clash")
    find(graph, aten.linear.default, 2).name = "clash"


def use_list(graph: fx.Graph) -> None:
    node = find(graph, aten.gelu.default)
    node.users.clear()


def shape(graph: fx.Graph) -> None:
    node = find(graph, aten.gelu.default)
    node.meta["val"] = node.meta["val"].double()


def no_shape(graph: fx.Graph) -> None:
    del find(graph, aten.gelu.default).meta["val"]


def op(graph: fx.Graph) -> None:
    find(graph, aten.gelu.default).target = aten.sum.default
    find(graph, aten.sum.default).kwargs = {}


def cannot_run(graph: fx.Graph) -> None:
    node = find(graph, aten.linear.default)
    node.args = (node.args[0], find(graph, aten.linear.default, 5).args[1], None)


def live_object(graph: fx.Graph) -> None:
    find(graph, aten.gelu.default).kwargs = {"approximate": object()}


def dynamic(graph: fx.Graph) -> None:
    node = find(graph, aten.gelu.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 8, 12)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (order, "before it is computed"),
        (name, "two nodes are called clash"),
        (use_list, "does not list"),
        (shape, "is recorded as"),
        (no_shape, "records no shape"),
        (op, "is recorded as"),
        (cannot_run, "cannot run"),
        (live_object, "holds a object, which is no data"),
        (dynamic, "is recorded as"),
    ],
)
def test_a_broken_graph_is_rejected(
    program: Program, corrupt: Callable[[fx.Graph], None], message: str
) -> None:
    with pytest.raises(VerifyError, match=message) as caught:
        verify(edited(program, "block0", corrupt), by="mutant")
    assert "mutant" in caught.value.what
    assert caught.value.where is not None


def lost_tensor(program: Program) -> Program:
    tensors = {k: v for k, v in program.tensors.items() if k != "blocks.1.up.weight"}
    return program.with_(tensors=tensors)


def resized_tensor(program: Program) -> Program:
    return program.with_(tensors={**program.tensors, "blocks.1.up.weight": torch.zeros(3, 3)})


def retyped_tensor(program: Program) -> Program:
    half = program.tensors["blocks.1.up.weight"].half()
    return program.with_(tensors={**program.tensors, "blocks.1.up.weight": half})


def untied(program: Program) -> Program:
    return program.with_(tensors={**program.tensors, "again": program.tensors["norm.weight"]})


def missing_slot(program: Program) -> Program:
    weights = dict(program.instances["blocks.1"].weights)
    weights.pop("up.weight")
    instance = Instance("block0", weights)
    return program.with_(instances={**program.instances, "blocks.1": instance})


def uncalled(program: Program) -> Program:
    extra = {"blocks.9": program.instances["blocks.0"]}
    return program.with_(instances={**program.instances, **extra})


def not_an_instance(program: Program) -> Program:
    kept = {k: v for k, v in program.instances.items() if k != "blocks.2"}
    return program.with_(instances=kept)


def called_twice(program: Program) -> Program:
    def edit(graph: fx.Graph) -> None:
        calls = [node for node in graph.nodes if node.op == "call_module"]
        calls[1].target = calls[0].target

    return edited(program, MAIN, edit)


def wrong_argument(program: Program) -> Program:
    def edit(graph: fx.Graph) -> None:
        call = next(node for node in graph.nodes if node.op == "call_module")
        call.args = (next(node for node in graph.nodes if node.op == "placeholder"),)

    return edited(program, MAIN, edit)


def fewer_outputs(program: Program) -> Program:
    return edited(program, MAIN, lambda graph: setattr(graph.output_node(), "args", ((),)))


def renamed_input(program: Program) -> Program:
    def edit(graph: fx.Graph) -> None:
        next(node for node in graph.nodes if node.op == "placeholder")._rename("other")

    return edited(program, MAIN, edit)


def wrong_result(program: Program) -> Program:
    def edit(graph: fx.Graph) -> None:
        call = next(node for node in graph.nodes if node.op == "call_module")
        call.meta = {"val": (*call.meta["val"], *call.meta["val"])}

    return edited(program, MAIN, edit)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lost_tensor, "which does not exist"),
        (resized_tensor, r"is \[3, 3\]"),
        (retyped_tensor, "its slot is"),
        (untied, "untied"),
        (missing_slot, "slots"),
        (uncalled, "nobody calls"),
        (not_an_instance, "no block instance"),
        (called_twice, "called twice"),
        (wrong_argument, "other values than it takes"),
        (fewer_outputs, "number of outputs"),
        (renamed_input, "changed the inputs"),
        (wrong_result, "other values than recorded"),
    ],
)
def test_a_broken_program_is_rejected(program: Program, corrupt: Corruption, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(corrupt(program), by="mutant")


def test_verifying_changes_nothing(program: Program) -> None:
    text = program.text()
    verify(program)
    verify(program)
    assert program.text() == text
    assert all(n.target is not operator.add for n in program.main.nodes)
