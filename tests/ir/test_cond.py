"""Choices: captured, run, checked, printed, saved, rewritten; weights in branches are weights."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.branches import branches_of, choices, is_cond, operands_of
from blockwright.ir.capture import capture
from blockwright.ir.cost import share_of
from blockwright.ir.errors import ArtefactError, CaptureError, VerifyError
from blockwright.ir.graphs import aten, copy_graph
from blockwright.ir.only_when import OnlyWhen
from blockwright.ir.program import MAIN, Program
from blockwright.ir.recognize import FeedForward
from blockwright.ir.recognize.linear import Linear
from blockwright.ir.recognize.place import Place, made_at
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.ir.serialize import from_json, to_json
from blockwright.ir.taps import tapped
from blockwright.ir.verify import verify
from blockwright.models.gpt import GPT
from blockwright.passes import FoldConstants, QuantizeWeights

BATCH = Dim("batch", min=1, max=16)
STEPS = [torch.tensor(step) for step in (0, 2, 5)]  # one for each way through `Chooser`


class Chooser(nn.Module):
    """Two choices, one inside the other; the first layer of a branch is tied to one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.deep, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.cond(step < 1, lambda x: self.deep(x) * 2, lambda x: x - 1, (x,))

        def outer(x: Tensor) -> Tensor:
            return inner(self.tied(x)) + self.table.exp()

        y = torch.cond(step < 3, outer, lambda x: self.other(x).relu(), (x,))
        return self.tied(y) + x


@pytest.fixture(scope="module")
def model() -> Chooser:
    torch.manual_seed(0)
    return Chooser().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def chooser(model: Chooser, x: Tensor) -> Program:
    return capture(model, (x, STEPS[0]), dynamic_shapes=({0: BATCH}, None))


def test_branches_are_graphs_and_their_weights_are_named_as_everywhere(
    chooser: Program, golden: Callable[[str, str], None]
) -> None:
    verify(chooser)
    golden("chooser", chooser.text())
    assert chooser.scope() == list(chooser.graphs)
    assert not chooser.unused_tensors()
    assert set(chooser.tensors) == {
        f"{layer}.{part}" for layer in ("tied", "deep", "other") for part in ("weight", "bias")
    } | {"table"}
    assert chooser.is_shared("tied.weight")
    assert not chooser.is_shared("deep.weight")
    assert not any(n.op == "get_attr" for node in choices(chooser.main) for n in operands_of(node))


def test_runs_as_the_model_at_every_step_size_and_precision(
    chooser: Program, model: Chooser, x: Tensor
) -> None:
    module = chooser.module()
    assert set(dict(module.named_parameters())) == set(chooser.parameters)
    for batch in (x, x[:1]):
        for step in STEPS:
            with torch.no_grad():
                expected = model(batch, step)
                torch.testing.assert_close(module(batch, step)[0], expected, rtol=0, atol=0)
            torch.testing.assert_close(run(chooser, [batch, step])[0], expected, rtol=0, atol=0)
            deep = run(chooser, [batch, step], dtype=torch.float64)[0]
            torch.testing.assert_close(deep, expected.double(), rtol=1e-5, atol=1e-6)


def test_a_branch_that_is_not_taken_is_not_computed(chooser: Program, x: Tensor) -> None:
    def linears(step: Tensor) -> int:
        seen: list[fx.Node] = []
        run(chooser, [x, step], on_node=lambda _, node, __: seen.append(node))
        return sum(node.target is aten.linear.default for node in seen)

    assert [linears(step) for step in STEPS] == [3, 2, 2]


def test_survives_saving(chooser: Program, x: Tensor) -> None:
    again = from_json(json.loads(json.dumps(to_json(chooser))), dict(chooser.tensors))
    verify(again)
    assert again.text() == chooser.text()
    assert again.structure_hash() == chooser.structure_hash()
    for step in STEPS:
        assert torch.equal(run(again, [x, step])[0], run(chooser, [x, step])[0])


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda node: {**node, "args": node["args"][:3]}, "is no choice between two graphs"),
        (lambda node: _renamed(node, 1, "main"), "names a branch that does not exist, 'main'"),
        (lambda node: _renamed(node, 2, "nowhere"), "names a branch that does not exist"),
        (lambda node: _renamed(node, 2, str(node["args"][1])), "shares the branch"),
        (lambda node: {**node, "args": [*node["args"][:3], {"tuple": [1]}]}, "is no choice"),
    ],
)
def test_a_file_with_a_malformed_choice_is_refused(
    chooser: Program, break_: Callable[[Any], Any], message: str
) -> None:
    data = json.loads(json.dumps(to_json(chooser)))
    nodes = data["graphs"][0]["nodes"]
    (index,) = (i for i, node in enumerate(nodes) if node.get("target") == "higher_order.cond")
    nodes[index] = break_(nodes[index])
    with pytest.raises(ArtefactError, match=message):
        from_json(data, dict(chooser.tensors))


def test_a_file_whose_branches_call_themselves_is_refused(chooser: Program) -> None:
    data = json.loads(json.dumps(to_json(chooser)))
    inner = next(g for g in data["graphs"] if g["name"] == "main.if0")
    node = next(n for n in inner["nodes"] if n.get("target") == "higher_order.cond")
    node["args"][1] = "main.if0"
    with pytest.raises(ArtefactError, match=r"shares the branch|nobody calls"):
        from_json(data, dict(chooser.tensors))


def _renamed(node: Any, index: int, name: str) -> Any:
    return {**node, "args": [name if i == index else a for i, a in enumerate(node["args"])]}


def _edited(program: Program, key: str, edit: Callable[[fx.Graph], None]) -> Program:
    graph = copy_graph(program.graphs[key])
    edit(graph)
    return program.with_(graphs={**program.graphs, key: graph})


def _cond(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if is_cond(node))


def _swap_operands(graph: fx.Graph) -> None:
    node = _cond(graph)
    node.args = (*node.args[:3], operands_of(node)[::-1])


def _ask_a_number(graph: fx.Graph) -> None:
    node = _cond(graph)
    step = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "step")
    node.args = (step, *node.args[1:])


def _give_another_shape(graph: fx.Graph) -> None:
    (result,) = graph.output_node().args[0]  # type: ignore[misc]
    with graph.inserting_before(graph.output_node()):
        smaller = graph.call_function(aten.select.int, (result, 0, 0))
    smaller.meta["val"] = result.meta["val"][0]
    graph.output_node().args = ((smaller,),)


def _name_a_lost_tensor(graph: fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "get_attr").target = "lost"


@pytest.mark.parametrize(
    ("key", "edit", "message"),
    [
        (MAIN, _swap_operands, "a branch of cond takes other values"),
        (MAIN, _ask_a_number, "cond does not ask one true or false"),
        ("main.else0", _give_another_shape, "a branch of cond gives other values"),
        ("main.if0.if0", _name_a_lost_tensor, "names the tensor 'lost'"),
    ],
)
def test_a_malformed_branch_does_not_verify(
    chooser: Program, key: str, edit: Callable[[fx.Graph], None], message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(_edited(chooser, key, edit))


def test_a_graph_that_nobody_calls_does_not_verify(chooser: Program) -> None:
    graphs = chooser.graphs
    stray = chooser.with_(graphs={**graphs, "stray": copy_graph(graphs["main.else0"])})
    with pytest.raises(VerifyError, match="nobody calls the graph 'stray'"):
        verify(stray)


def test_the_dearer_branch_counts(chooser: Program, x: Tensor) -> None:
    cost = chooser.cost()
    assert cost.by_kind["linear"] == 3 * 2 * 3 * 4 * 4
    assert cost.parameters == 3 * 20
    assert cost.expected_flops == cost.flops  # nothing says how often
    assert sum(cost.by_path.values()) == cost.flops
    assert "expected_flops" not in cost.to_json()
    assert chooser.explain().parameters == 3 * 20


class Scheduled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("active", torch.tensor([True, False, False, False]))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        flag = aten.index.Tensor(self.active, [step])
        result: Tensor = torch.cond(flag, lambda x: self.up(x), lambda x: x.clone(), (x,))
        return result


def test_the_share_of_a_schedule_is_known(x: Tensor) -> None:
    program = capture(Scheduled().eval(), (x, STEPS[0]))
    (choice,) = choices(program.main)
    assert share_of(program, choice) == 0.25
    linear = 2 * 3 * 4 * 4
    cost = program.cost()
    assert cost.by_kind["linear"] == linear
    # the flag, on every call, and the copy, on three of four
    assert cost.expected_flops == round(1 + 0.25 * linear + 0.75 * 3 * 4)
    assert cost.to_json()["expected_flops"] == cost.expected_flops


def test_passes_reach_into_branches(chooser: Program, x: Tensor) -> None:
    inputs = [[x, step] for step in STEPS]
    passes = [FoldConstants(), QuantizeWeights(bits=8, group_size=4)]
    new, (folded, quantized) = run_passes(chooser, passes, inputs)
    assert folded.receipt.changed == ("exp",)
    assert quantized.receipt.changed == ("deep", "other")
    assert quantized.receipt.skipped.keys() == {"tied", "tied#1"}
    assert {"tied.weight", "deep.codes", "other.codes"} <= set(new.tensors)
    assert "deep.weight" not in new.tensors
    assert quantized.certificate is not None
    for step in STEPS:
        before, after = (run(p, [x, step])[0] for p in (chooser, new))
        torch.testing.assert_close(after, before, rtol=0, atol=0.05)


def test_a_tied_weight_stays_one_tensor(chooser: Program) -> None:
    layers = [layer for layer in chooser.regions(Linear) if "tied" in layer.path]
    assert [layer.graph for layer in layers] == ["main.if0", MAIN]
    assert len({layer.label for layer in layers}) == 2
    assert all(layer.weight is chooser.tensors["tied.weight"] for layer in layers)
    assert all(layer.weight_is_shared for layer in layers)


class Gate(nn.Module):
    """A feed-forward network that does nothing for short values."""

    def __init__(self, ffn: FeedForward, bound: float) -> None:
        super().__init__()
        self.up = nn.Parameter(ffn.up_layer.weight, requires_grad=False)
        self.up_bias = nn.Parameter(ffn.up_layer.bias, requires_grad=False)
        self.down = nn.Parameter(ffn.down_layer.weight, requires_grad=False)
        self.down_bias = nn.Parameter(ffn.down_layer.bias, requires_grad=False)
        self.register_buffer("bound", torch.tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            hidden = F.gelu(F.linear(x, self.up, self.up_bias), approximate="tanh")
            return F.linear(hidden, self.down, self.down_bias)

        result: Tensor = torch.cond(x.square().sum() > self.bound, compute, lambda x: x * 0, (x,))
        return result


@pytest.mark.parametrize("instances", [1, 3])
def test_a_replacement_may_choose(
    program: Program, gpt: GPT, tokens: Tensor, instances: int
) -> None:
    """In a class that splits, and in one that does not; some gates are open, some shut."""
    replaced = [
        (ffn, Gate(ffn, bound=1e9 if number == 1 else -1.0))
        for number, ffn in enumerate(program.feed_forwards()[:instances])
    ]
    new = rewrite(program, replaced, by="gate")
    verify(new)
    blocks = {instance.block for instance in new.instances.values()}
    assert len(blocks) == (2 if instances == 1 else 1)
    assert set(program.parameters) <= set(new.tensors)  # found again, not stored again
    expected = run(program, [tokens], instead=replaced)
    torch.testing.assert_close(run(new, [tokens]), expected)
    with torch.no_grad():
        torch.testing.assert_close(list(new.module()(tokens)), expected)
    gates = [layer for layer in new.regions(Linear) if ".if" in layer.graph]
    assert len(gates) == 2 * instances
    assert gates[0].label != gates[1].label
    again = from_json(json.loads(json.dumps(to_json(new))), dict(new.tensors))
    assert again.text() == new.text()
    quantized, (step,) = run_passes(new, [QuantizeWeights(bits=8, group_size=4)], [[tokens]])
    assert step.receipt.skipped == {} or "up" not in " ".join(step.receipt.skipped)
    verify(quantized)


class Positive(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].sum() > 0


class First(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


def test_a_region_moves_into_a_branch_as_it_is(program: Program, tokens: Tensor) -> None:
    ffns = program.feed_forwards()
    replaced = [(ffn, OnlyWhen(ffn, Positive(), First())) for ffn in ffns]
    new = rewrite(program, replaced, by="sometimes")
    verify(new)
    assert set(new.tensors) == set(program.tensors)
    assert len(new.instances) == len(program.instances)
    assert [i.block for i in new.instances.values()] == ["block0"] * 3
    torch.testing.assert_close(
        run(new, [tokens]), run(program, [tokens], instead=replaced), rtol=0, atol=0
    )
    inside = [layer.graph for layer in new.regions(Linear) if layer.graph.endswith(".if0")]
    assert len(inside) == 2 * len(ffns)


def test_values_are_followed_out_of_branches_but_not_through_choices(chooser: Program) -> None:
    graph = chooser.graphs["main.else0"]
    (place,) = (node for node in graph.nodes if node.op == "placeholder" and node.users)
    assert made_at(chooser, Place(None, place)).node.name == "x"
    picked = next(n for n in chooser.main.nodes if n.target is operator.getitem)
    assert made_at(chooser, Place(None, picked)).node is picked


def test_taps_pass_choices(chooser: Program, x: Tensor) -> None:
    picked = next(n for n in chooser.main.nodes if n.target is operator.getitem)
    module = tapped(chooser, [Place(None, picked)])
    for step in STEPS:
        values: dict[fx.Node, Any] = {}
        run(chooser, [x, step], on_node=lambda _, node, value, v=values: v.update({node: value}))
        with torch.no_grad():
            assert torch.equal(module(x, step)[0], values[picked])


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(
            x.sum() > 0, lambda x: x + torch.tensor([1.0, 2.0]), lambda x: x - 1, (x,)
        )
        return result


def test_a_tensor_made_in_a_branch_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"a branch of torch.cond makes a tensor"):
        capture(Constant().eval(), (torch.ones(3, 2),))


class Counter(nn.Module):
    """Chooses by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = torch.cond(self.calls > 1, lambda x: self.up(x), lambda x: x * 2, (x,))
        return result


def test_a_choice_may_depend_on_state(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    program = capture(model, (x,))
    verify(program)
    first, calls = run(program, program.arranged([x]))
    second, _ = run(program, program.arranged([x], {"calls": calls}))
    assert torch.equal(first, x * 2)
    assert torch.equal(second, model.up(x))


class Passing(nn.Module):
    """One branch returns its input, the other a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda x: x, lambda x: x.flip(0).view(3, 4), (x,))
        return result


def test_a_branch_may_return_what_it_is_given(x: Tensor) -> None:
    program = capture(Passing(), (x,))
    verify(program)
    module = program.module()
    torch.export.export(module, (x,)).run_decompositions({})  # refuses branches that share memory
    for value in (x.abs(), -x.abs()):
        with torch.no_grad():
            assert torch.equal(run(program, [value])[0], Passing()(value))
            assert torch.equal(module(value)[0], Passing()(value))


class Deep(nn.Module):
    """Blocks that choose: equal, and yet not one class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.cond(x.sum() > 0, layer, lambda x: x * 2, (x,))
        return x


def test_blocks_that_choose_are_captured_flat(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    program = capture(model, (x,))
    verify(program)
    assert not program.instances
    assert len(choices(program.main)) == 3
    assert len({key for node in choices(program.main) for key in branches_of(node)}) == 6
    with torch.no_grad():
        assert torch.equal(run(program, [x])[0], model(x))


def test_a_choice_of_something_else_is_no_choice(chooser: Program) -> None:
    def put_a_number(graph: fx.Graph) -> None:
        node = _cond(graph)
        node.args = (node.args[0], 3, *node.args[2:])

    with pytest.raises(VerifyError, match="is no choice between two graphs"):
        verify(_edited(chooser, MAIN, put_a_number))
