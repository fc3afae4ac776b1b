"""A program written as JSON and read back is the same program; anything else is refused."""

from __future__ import annotations

import copy
import json
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError
from blockwright.ir.flatten import flatten
from blockwright.ir.literals import decode, encode
from blockwright.ir.program import Program
from blockwright.ir.propagate import evaluate
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.ir.serialize import from_json, to_json
from blockwright.ir.shapes import describe
from blockwright.ir.targets import resolve, target_name
from blockwright.ir.verify import verify
from blockwright.passes import QuantizeWeights

Dim = torch.export.Dim


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.down(F.gelu(self.up(x), approximate="tanh"))


class Tied(nn.Module):
    """Two blocks between an embedding and a head that share a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.layers = nn.ModuleList(Block(8) for _ in range(2))
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Any:
        x = self.embed(ids) * scale
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if mask is not None:
            logits = logits.masked_fill(mask[..., None], -math.inf)
        rows = x.reshape(ids.shape[0] * ids.shape[1], 8)
        return {"logits": logits, "rest": (rows.argmax(-1), None, 3)}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]


def tied() -> Program:
    torch.manual_seed(0)
    batch, seq = Dim("batch", min=1, max=64), Dim("seq", min=2, max=32)
    axes = {0: batch, 1: seq}
    ids = torch.randint(11, (2, 5))
    inputs = {"ids": ids, "scale": 0.5, "mask": ids == 3}
    shapes = {"ids": axes, "scale": None, "mask": axes}
    return capture(Tied(), inputs, dynamic_shapes=shapes)


def counter() -> Program:
    return capture(Counter(), (torch.ones(2, 3),), dynamic_shapes={"x": {0: Dim("rows", min=1)}})


def halves() -> Program:
    half = Dim("half", min=2, max=50)
    return capture(Halves(), (torch.ones(6, 2),), dynamic_shapes={"x": {0: 2 * half}})


def quantized() -> Program:
    program, pass_ = tied(), QuantizeWeights()
    plan = pass_.plan(program)
    assert plan.decisions
    regions = [region for region in pass_.regions(program) if region.label in plan.decisions]
    return rewrite(
        program, [(r, pass_.replace(r, plan.decisions[r.label])) for r in regions], by=pass_.name
    )


PROGRAMS: dict[str, Callable[[], Program]] = {
    "tied": tied, "flat": lambda: flatten(tied()), "counter": counter, "halves": halves,
    "quantized": quantized,
}  # fmt: skip


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    return PROGRAMS[request.param]()


@pytest.fixture(scope="module")
def plain() -> Program:
    return tied()


def through_text(program: Program) -> Program:
    text = json.dumps(to_json(program), sort_keys=True, allow_nan=False)
    return from_json(json.loads(text), program.tensors)


def test_round_trip_keeps_everything(program: Program) -> None:
    loaded = through_text(program)
    assert to_json(loaded) == to_json(program)
    assert loaded.signature == program.signature
    assert loaded.sizes() == program.sizes()
    for field in ("instances", "aliases", "parameters", "state", "notes"):
        assert getattr(loaded, field) == getattr(program, field), field
    assert list(loaded.tensors) == list(program.tensors)
    assert loaded.text() == program.text()
    assert loaded.structure_hash() == program.structure_hash()


def test_round_trip_finds_the_shapes_again(program: Program) -> None:
    loaded = through_text(program)
    verify(loaded)
    for key, graph in program.graphs.items():
        for old, new in zip(graph.nodes, loaded.graphs[key].nodes, strict=True):
            assert describe(new.meta.get("val")) == describe(old.meta.get("val")), old


def test_a_loaded_program_computes_the_same_at_other_sizes(plain: Program) -> None:
    loaded = through_text(plain)
    for shape in [(1, 2), (3, 9)]:
        ids = torch.randint(11, shape)
        for old, new in zip(run(plain, [ids, ids == 1]), run(loaded, [ids, ids == 1]), strict=True):
            assert torch.equal(old, new)


def test_passes_change_a_loaded_program_alike(plain: Program) -> None:
    pass_, loaded = QuantizeWeights(), through_text(plain)
    assert pass_.plan(loaded) == pass_.plan(plain)


def test_provenance_survives() -> None:
    loaded = through_text(quantized())
    made = [node for graph in loaded.graphs.values() for node in graph.nodes
            if node.meta.get("from_node")]  # fmt: skip
    assert {node.meta["from_node"][-1].pass_name for node in made} == {"quantize-weights"}
    assert any(node.meta["local_path"] for node in made)


def test_a_loaded_program_exports_again(plain: Program) -> None:
    ids = torch.randint(11, (2, 5))
    axes = {0: Dim("b", min=1, max=64), 1: Dim("s", min=2, max=32)}
    again = torch.export.export(
        through_text(plain).module(), (ids, ids == 3), dynamic_shapes=(axes, axes)
    )
    other = torch.randint(11, (3, 4))
    for old, new in zip(
        run(plain, [other, other == 3]), again.module()(other, other == 3), strict=True
    ):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 1, 1.0, -0.0, math.inf, -math.inf, "text", [], (), [1, (2, [3.5])],
        slice(1, None, 2), {"key": [1, {"other": None}]}, torch.float8_e4m3fn,
        torch.device("cuda:1"), torch.strided, torch.channels_last,
    ],
)  # fmt: skip
def test_literals_round_trip(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_nan_round_trips() -> None:
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, torch.ones(1), lambda: None])
def test_live_objects_are_refused(value: Any) -> None:
    with pytest.raises(ArtefactError, match="cannot be saved as an argument"):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [
        {"node": "x"}, {"dtype": "load"}, {"dtype": "__name__"}, {"device": "/etc/passwd"},
        {"float": "1"}, {"unknown": 1}, {"dtype": "float32", "more": 1}, {"layout": 3},
    ],
)  # fmt: skip
def test_unknown_literals_are_refused(data: Any) -> None:
    with pytest.raises(ArtefactError):
        decode(data)


@pytest.mark.parametrize("function", [operator.getitem, operator.mul, math.floor, torch.sym_max])
def test_arithmetic_round_trips(function: Callable[..., Any]) -> None:
    assert resolve(target_name(function)) is function


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr",
        "torch.load", "operator.attrgetter", "_operator.methodcaller", "math.__loader__",
        "aten.from_file.default", "aten.save.default", "aten._print.default", "aten.warn.default",
        "aten.add_.Tensor", "aten.set_.source_Tensor", "aten.__class__.mro", "aten.add.__init__",
        "aten.add", "aten.no_such_op.default", "blockwright.no_such_op.default",
        "quantized.linear.default", "aten.linear.default\n", "",
    ],
)  # fmt: skip
def test_only_pure_operations_resolve(name: str) -> None:
    with pytest.raises(ArtefactError, match="is not an operation"):
        resolve(name)


@pytest.mark.parametrize(
    ("text", "value"), [("2*s1 + 3", 13), ("s1//2", 2), ("Max(s1, 9) - 1", 8), ("-s1 % 4", 3)]
)
def test_sizes_are_evaluated(text: str, value: int) -> None:
    assert evaluate(text, {"s1": 5}) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "s1.__class__", "s1[0]", "(lambda: 1)()", "s2", "2**99",
        "Max(1)", "1/2", "'a'", "s1 if s1 else 0", "s1 //0", "", "(" * 400, "print(1, 2)",
    ],
)  # fmt: skip
def test_other_expressions_are_no_sizes(text: str) -> None:
    with pytest.raises(ArtefactError, match="is not a size"):
        evaluate(text, {"s1": 5})


def nodes(data: dict[str, Any], graph: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data["graphs"][graph]["nodes"]
    return found


def call(data: dict[str, Any], target: str) -> dict[str, Any]:
    return next(n for graph in data["graphs"] for n in graph["nodes"] if n.get("target") == target)


CORRUPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no graphs": lambda d: d.pop("graphs"),
    "a graph that is a number": lambda d: d.update(graphs=[3]),
    "no nodes": lambda d: nodes(d).clear(),
    "code as an argument name": lambda d: next(
        n for n in nodes(d) if n["op"] == "placeholder"
    ).update(target="x=__import__('os').system('true')"),
    "code as a keyword": lambda d: call(d, "aten.gelu.default").update(
        kwargs=[["approximate='none') or print(", "tanh"]]
    ),
    "code as a node name": lambda d: nodes(d)[0].update(name="x;import os"),
    "code as a tensor name": lambda d: nodes(d)[0].update(target='a"),print("'),
    "an unknown op": lambda d: call(d, "aten.gelu.default").update(target="os.system"),
    "an unknown kind of node": lambda d: nodes(d)[-2].update(op="call_method"),
    "a node used before it is there": lambda d: nodes(d).insert(0, nodes(d).pop()),
    "a node twice": lambda d: nodes(d).append(nodes(d)[0]),
    "an argument too many": lambda d: call(d, "aten.gelu.default")["args"].append(1),
    "a shape that does not fit": lambda d: call(d, "aten.unflatten.int").update(
        args=[*call(d, "aten.unflatten.int")["args"][:2], [7, 7, 7]]
    ),
    "an endless power": lambda d: call(d, "_operator.mul").update(
        target="_operator.pow", args=[9, 10**6]
    ),
    "a size beyond 63 bits": lambda d: call(d, "_operator.mul").update(args=[2**62, 2**62]),
    "a block without weights": lambda d: d["instances"][0]["weights"].clear(),
    "a block of no class": lambda d: d["instances"][0].update(block="missing"),
    "a block that calls main": lambda d: d["instances"][0].update(block="main"),
    "a block that nobody calls": lambda d: d["instances"].append(
        {**d["instances"][0], "name": "ghost"}
    ),
    "a tensor that is not there": lambda d: d["tensors"].append(["ghost", "float32", [1]]),
    "a tensor of another shape": lambda d: d["tensors"][0].__setitem__(2, [1, 2]),
    "a tensor of another type": lambda d: d["tensors"][0].__setitem__(1, "float64"),
    "an alias of nothing": lambda d: d["aliases"].update({"other": "ghost"}),
    "a parameter that is not there": lambda d: d["parameters"].append("ghost"),
    "state that is not there": lambda d: d["state"].append(["ghost", "ids", 0]),
    "an input nobody feeds": lambda d: d["signature"]["arguments"].pop(),
    "code as a symbol": lambda d: d["symbols"].update({"__import__('os')": [2, 2, 9]}),
    "a symbol outside its range": lambda d: d["symbols"].update(
        {name: [2, 5, 9] for name in d["symbols"]}
    ),
    "a missing symbol": lambda d: d["symbols"].clear(),
    "a path as a device": lambda d: next(n for n in nodes(d) if "value" in n)["value"].update(
        device="/dev/sda"
    ),
    "endless nesting": lambda d: d["signature"].update(outputs=nest(2 * sys.getrecursionlimit())),
}


def nest(depth: int) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": "leaf"}
    for _ in range(depth):
        data = {"kind": "tuple", "children": [data]}
    return data


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_malformed_graph_is_refused(plain: Program, corruption: str) -> None:
    data = copy.deepcopy(to_json(plain))
    CORRUPTIONS[corruption](data)
    with pytest.raises(ArtefactError):
        from_json(data, plain.tensors)


@pytest.mark.parametrize(
    "name", ["", "a..b", ".a", "a'b", 'a"b', "a\\b", "a\nb", "a\0b", "a\u202eb", "x" * 5000]
)
def test_unsafe_tensor_names_are_refused_when_saving(plain: Program, name: str) -> None:
    tensors = {**plain.tensors, name: torch.ones(1)}
    with pytest.raises(ArtefactError, match="is not a name"):
        to_json(plain.with_(tensors=tensors))


def test_reading_is_deterministic_and_leaves_its_input_alone(plain: Program) -> None:
    data = to_json(plain)
    before = json.dumps(data, sort_keys=True)
    again = json.dumps(to_json(from_json(data, plain.tensors)), sort_keys=True)
    assert json.dumps(data, sort_keys=True) == before == again
