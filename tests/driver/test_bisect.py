"""Bisection: faults planted in one pass, one block, one op, found in O(log n) runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from blockwright.backends import container
from blockwright.backends.base import Backend, Lowered
from blockwright.backends.registry import get_backend
from blockwright.driver import bisect_case, cli, cli_bisect, register, reproducer
from blockwright.driver.bisect import Culprit, bisect
from blockwright.driver.bisect_backend import bisect_backend
from blockwright.driver.bisect_case import case_of_engine, case_of_pass, read, replay, write
from blockwright.driver.bisect_op import find_op
from blockwright.driver.bisect_pass import Applied
from blockwright.driver.bisect_search import Bound, Evaluator, crossing, distance
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, NoMatchError, OptionError
from blockwright.ir.graphs import copy_graph
from blockwright.ir.program import Program
from blockwright.ir.recognize import FeedForward, Linear, Norm
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import PASSES, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip

DEPTH = 16


@pytest.fixture(scope="module")
def deep() -> Program:
    """Sixteen blocks, width 8."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=DEPTH, ffn_dim=12)).eval()
    return capture(model, (torch.zeros(2, 8, dtype=torch.long),))


@dataclass(frozen=True, kw_only=True)
class Rebuild(Pass[Linear, float]):
    """Rebuild every linear layer as it is, but for a factor where a fault is planted.

    Attributes:
        at: Label of the layer with the fault.
        factor: What its output is multiplied by.
    """

    name: ClassVar[str] = "rebuild"
    promise: ClassVar[Promise] = Promise.EXACT
    at: str = ""
    factor: float = 1.5

    def decide(self, region: Linear) -> float | Skip:
        if "blocks" not in region.label:
            return Skip("is no part of a block", at=region)
        return self.factor if region.label == self.at else 1.0

    def replace(self, region: Linear, decision: float) -> nn.Module:
        return Rebuilt(region.weight, region.bias, decision)


class Rebuilt(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, factor: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias if bias is None else nn.Parameter(bias)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.factor == 1.0 else y * self.factor


def log2(count: int) -> int:
    return math.ceil(math.log2(count))


def test_crossing_measures_both_sides_and_no_more_than_log2() -> None:
    for size in (1, 2, 3, 8, 1000):
        for first in range(1, size + 1, max(1, size // 7)):
            asked: list[int] = []

            def beyond(index: int, first: int = first, asked: list[int] = asked) -> bool:
                asked.append(index)
                return index >= first

            assert crossing(beyond, 0, size) == first
            assert len(asked) <= log2(size)


def test_crossing_is_one_even_where_errors_cancel() -> None:
    errors = [0, 0, 1, 0, 0, 1, 1, 0, 1]  # within, beyond, within again
    found = crossing(lambda i: errors[i] > 0, 0, 8)
    assert (errors[found - 1], errors[found]) == (0, 1)


def test_the_pass_the_block_and_the_op_are_found(deep: Program, tokens: Tensor) -> None:
    recipe = [Rebuild(at="blocks.11.up" if index == 5 else "") for index in range(8)]
    found = bisect(deep, recipe, [[tokens]], Bound(1e-4))
    culprit = found.culprit
    assert culprit is not None
    assert (culprit.position, culprit.block, culprit.region.label) == (
        5, "blocks.11", "blocks.11.up",
    )  # fmt: skip
    assert culprit.before.error < 1e-6
    assert culprit.after.error > 1e-4
    assert culprit.alone.beyond
    assert (culprit.op.verdict, culprit.op.op) == ("different", "mul(linear, 1.5)")
    assert found.runs <= 4 + log2(8) + log2(DEPTH) + log2(6)
    assert found.to_json()["culprit"]["decision"] == 1.5


@pytest.mark.parametrize("block", [0, 15])
def test_any_of_sixteen_blocks(deep: Program, tokens: Tensor, block: int) -> None:
    found = bisect(deep, [Rebuild(at=f"blocks.{block}.attention.value")], [[tokens]], Bound(1e-4))
    assert found.culprit is not None
    assert found.culprit.region.label == f"blocks.{block}.attention.value"
    assert found.runs <= 4 + log2(DEPTH) + log2(6)


@pytest.mark.parametrize("metric", ["relative", "cosine", "rounding"])
def test_a_recipe_within_the_bound_says_so(deep: Program, tokens: Tensor, metric: str) -> None:
    bound = Bound(None if metric == "rounding" else 1e-4, metric)
    found = bisect(deep, [Rebuild(), Rebuild()], [[tokens]], bound)
    assert found.culprit is None
    assert found.runs <= 3
    assert found.to_json()["within"] is True


def test_the_rounding_rule_needs_no_number(deep: Program, tokens: Tensor) -> None:
    recipe = [Rebuild(at="blocks.3.down", factor=1.0001)]
    found = bisect(deep, recipe, [[tokens]], Bound(metric="rounding"))
    assert found.culprit is not None
    assert found.culprit.block == "blocks.3"


def test_errors_that_add_up_are_told_from_a_fault(deep: Program, tokens: Tensor) -> None:
    pass_ = QuantizeWeights(bits=8)
    whole = bisect(deep, [pass_], [[tokens]], Bound(1e-9)).error
    found = bisect(deep, [pass_], [[tokens]], Bound(0.9 * whole))
    assert found.culprit is not None
    assert found.culprit.to_json()["accumulates"] is True
    assert "quantized_linear(" in found.culprit.op.op
    assert "codes, scale, None, bias, 8, " in found.culprit.op.op


def test_the_worst_input_set_counts(program: Program, tokens: Tensor) -> None:
    sets = [[tokens[:1]], [tokens[1:]], [tokens]]
    changed = Applied.of(Rebuild(at="blocks.2.up"), program, sets).after()
    errors = [Evaluator(program, [each], Bound(1e-4))(changed).error for each in sets]
    measured = Evaluator(program, sets, Bound(1e-4))(changed)
    assert len(set(errors)) == 3
    assert (measured.error, measured.worst) == (max(errors), errors.index(max(errors)))
    culprit = bisect(program, [Rebuild(at="blocks.2.up")], sets, Bound(1e-4)).culprit
    assert culprit is not None
    assert culprit.inputs is sets[measured.worst]


def test_a_pass_that_changes_nothing_is_no_result(deep: Program, tokens: Tensor) -> None:
    with pytest.raises(NoMatchError, match="quantize-weights changes nothing"):
        bisect(deep, [QuantizeWeights(include=("gone",))], [[tokens]], Bound(1e-3))


def test_bounds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(OptionError, match="takes a bound"):
        Bound()
    with pytest.raises(OptionError, match="takes no bound"):
        Bound(1e-3, "rounding")
    with pytest.raises(OptionError, match="metric=mse"):
        Bound(1e-3, "mse")
    with pytest.raises(OptionError, match="is no error"):
        Bound(-1.0)


def test_distance_counts_what_a_norm_would_hide() -> None:
    one = torch.tensor([1.0, 2.0])
    assert distance(one, torch.tensor([1.0, float("nan")])) == math.inf
    assert distance(one, one[:1]) == math.inf
    assert distance(torch.zeros(2, 3), torch.zeros(2, 3), "cosine") == 0
    assert distance(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), "cosine") == 1


class FFN(nn.Module):
    """A feed-forward network with a choice of activations."""

    def __init__(self, ffn: FeedForward, act: str) -> None:
        super().__init__()
        up, down = ffn.up_layer, ffn.down_layer
        self.up = nn.Parameter(up.weight)
        self.down = nn.Parameter(down.weight)
        assert up.bias is not None
        assert down.bias is not None
        self.up_bias, self.down_bias = nn.Parameter(up.bias), nn.Parameter(down.bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.up, self.up_bias)
        if self.act == "half":
            h = F.gelu(h.half().float(), approximate="tanh")
        elif self.act == "spelled":
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        else:
            h = F.gelu(h, approximate=self.act)
        return F.linear(h, self.down, self.down_bias)


@pytest.mark.parametrize(
    ("act", "verdict", "op"),
    [
        ("none", "different", "gelu(linear)"),
        ("half", "numerical", "to(linear, float16)"),
        ("tanh", "same", ""),
        ("spelled", "same", ""),
    ],
)
def test_a_wrong_op_is_told_from_an_inexact_one(
    deep: Program, act: str, verdict: str, op: str
) -> None:
    region = deep.feed_forwards()[4]
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    fault = find_op(region, FFN(region, act), [x])
    assert (fault.verdict, fault.op) == (verdict, op)
    if act == "none":
        assert fault.nearest == "gelu(linear_4, approximate=tanh)"
        assert "has no counterpart" in str(fault)


class WithoutEps(nn.Module):
    """A layer norm that forgot its epsilon, spelled out."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        assert norm.weight is not None
        assert norm.bias is not None
        self.weight, self.bias = nn.Parameter(norm.weight), nn.Parameter(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * centred.square().mean(-1, keepdim=True).rsqrt() * self.weight + self.bias


def test_a_dropped_epsilon_is_another_function(deep: Program) -> None:
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    fault = find_op(deep.norms()[3], WithoutEps(deep.norms()[3]), [x])
    assert fault.verdict == "different"
    assert fault.nearest.startswith("layer_norm") or fault.op.startswith("mean")


class Faulty(Backend):
    """Eager, but for one op in one block."""

    name: ClassVar[str] = "faulty"

    def __init__(self, instance: str, op: str) -> None:
        self.instance, self.op, self.lowered = instance, op, 0

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        self.lowered += 1
        return FaultyLowered(program, self)


class FaultyLowered(Lowered):
    def __init__(self, program: Program, backend: Faulty) -> None:
        self.program, self.backend = program, backend

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        graph = copy_graph(self.program.main)
        for node in graph.nodes:
            at = node.meta.get("instance", self.backend.instance), str(node.target)
            if at == (self.backend.instance, self.backend.op):
                node.kwargs = {}  # gelu forgets that it is approximate
        return run(self.program.with_(graphs={"main": graph}), inputs)


@pytest.mark.parametrize("block", [0, 15])
def test_the_op_an_engine_gets_wrong(deep: Program, tokens: Tensor, block: int) -> None:
    backend = Faulty(f"blocks.{block}", "aten.gelu.default")
    found = bisect_backend(deep, backend, [[tokens]], Bound(1e-7))
    assert found.culprit is not None
    assert found.culprit.block == f"blocks.{block}"
    assert found.culprit.to_json()["op"].startswith("gelu(")
    assert not found.culprit.before.beyond
    assert found.culprit.after.beyond
    assert found.lowered == backend.lowered <= 1 + log2(DEPTH + 1) + log2(24)


def test_an_engine_that_is_right_is_left_alone(deep: Program, tokens: Tensor) -> None:
    found = bisect_backend(deep, Faulty("gone", ""), [[tokens]], Bound(metric="rounding"))
    assert (found.culprit, found.lowered) == (None, 1)


@pytest.mark.slow
def test_prefixes_lower_to_onnxruntime(program: Program, tokens: Tensor) -> None:
    found = bisect_backend(program, get_backend("onnxruntime"), [[tokens]], Bound(1e-9))
    assert found.culprit is not None  # rounding alone exceeds such a bound
    assert found.culprit.before.error <= 1e-9 < found.culprit.after.error


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes name the pass of this file."""
    monkeypatch.setattr(register, "PASSES", (*PASSES, Rebuild))


def faulty(program: Program, tokens: Tensor, at: str = "blocks.11.up") -> Culprit:
    culprit = bisect(program, [Rebuild(at=at)], [[tokens]], Bound(1e-4)).culprit
    assert culprit is not None
    return culprit


@pytest.mark.usefixtures("registered")
def test_the_smallest_case_is_one_block_and_replays(
    deep: Program, tokens: Tensor, tmp_path: Path
) -> None:
    case = case_of_pass(faulty(deep, tokens), Bound(1e-4))
    assert list(case.program.instances) == ["blocks.11"]
    assert all(name.startswith("blocks.11.") for name in case.program.tensors)
    assert [tuple(value.shape) for value in case.inputs] == [(2, 8, 8)]
    verify(case.program)
    folder = write(tmp_path / "case", case)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    again = read(folder)
    assert again.about["plan"]["decisions"] == {"blocks.11.up": 1.5}
    assert "bisect --run" in next(folder.glob("README*")).read_text()
    replayed = replay(folder)
    assert replayed.same
    assert replayed.error == case.error > 1e-4
    assert "the same fault" in str(replayed)


@pytest.mark.usefixtures("registered")
def test_a_case_is_gone_once_the_pass_is_right(
    deep: Program, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "case", case_of_pass(faulty(deep, tokens), Bound(1e-4)))
    right = lambda self, region, decision: Rebuilt(region.weight, region.bias, 1.0)  # noqa: E731
    monkeypatch.setattr(Rebuild, "replace", right)
    replayed = replay(folder)
    assert not replayed.same
    assert "the fault is gone" in str(replayed)


@pytest.mark.usefixtures("registered")
def test_sizes_of_the_whole_model_become_constants(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    culprit = faulty(program, tokens, "blocks.1.attention.key")  # captured with a dynamic batch
    case = case_of_pass(culprit, Bound(1e-4))
    assert case.about["minimal"]
    assert replay(write(tmp_path / "case", case)).same


@pytest.mark.usefixtures("registered")
def test_blocks_of_a_flat_model_are_cut_as_well(gpt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    culprit = faulty(capture(gpt, (tokens,), fold=False), tokens, "blocks.1.up")
    assert (culprit.block, culprit.region.label) == ("blocks.1", "blocks.1.up")
    case = case_of_pass(culprit, Bound(1e-4))
    assert case.about["minimal"]
    assert {name.split(".")[1] for name in case.program.tensors} == {"1"}
    assert replay(write(tmp_path / "case", case)).same


def test_the_smallest_case_of_an_engine_is_one_op(
    deep: Program, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Faulty("blocks.9", "aten.gelu.default")
    found = bisect_backend(deep, backend, [[tokens]], Bound(1e-7))
    assert found.culprit is not None
    case = case_of_engine(found, found.culprit, backend, [[tokens]], {})
    assert [n.op for n in case.program.main.nodes] == ["placeholder", "call_function", "output"]
    monkeypatch.setattr(bisect_case, "get_backend", lambda name: backend)
    folder = write(tmp_path / "case", case)
    assert replay(folder).same
    backend.op = ""
    assert not replay(folder).same


def test_what_is_no_case_is_refused(deep: Program, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        replay(tmp_path)
    with container.Writer(tmp_path / "other") as writer:
        writer.commit({"kind": "something else"})
    with pytest.raises(ArtefactError, match="holds no bisected case"):
        replay(tmp_path / "other")


MODEL = """
import torch
from blockwright.models.gpt import GPT, GPTConfig


class Offers(GPT):
    def example_inputs(self):
        return (torch.arange(8).reshape(1, 8),)


def tiny():
    torch.manual_seed(0)
    return Offers(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["bisect", *args])


@pytest.mark.usefixtures("registered")
def test_the_command_finds_writes_and_replays(folder: Path) -> None:
    recipe = ("--pass", "rebuild", "--pass", "rebuild{at=blocks.1.down}")
    result = call("tiny.py:tiny", *recipe, "--bound", "1e-3", "-o", "case")
    assert result.exit_code == 1, result.output
    for text in ("exceeds relative error 0.001", "blocks.1.down", "mul(linear, 1.5)", "saved case"):
        assert text in result.stdout
    again = call("--run", "case")
    assert (again.exit_code, "the same fault" in again.stdout) == (1, True)
    found = json.loads(call("--run", "case", "--json").stdout)
    assert found["same"] is True
    data = json.loads(call("tiny.py:tiny", *recipe, "--bound", "1e-3", "--json").stdout)
    assert (data["culprit"]["position"], data["culprit"]["block"]) == (1, "blocks.1")


@pytest.mark.usefixtures("registered")
def test_the_command_within_the_bound_writes_nothing(folder: Path) -> None:
    for options in ((), ("--bound", "0.5", "--metric", "cosine")):
        result = call("tiny.py:tiny", "--pass", "rebuild", "-o", "case", *options)
        assert result.exit_code == 0, result.output
        assert "stays within" in result.stdout
        assert not (folder / "case").exists()


def test_the_command_bisects_an_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Faulty("blocks.2", "aten.gelu.default")
    for module in (cli_bisect, bisect_case):
        monkeypatch.setattr(module, "get_backend", lambda name: backend)
    options = ("--pass", "fuse-projections", "--backend", "faulty", "--bound", "1e-7", "-o", "case")
    result = call("tiny.py:tiny", *options)
    assert result.exit_code == 1, result.output
    assert "gelu(" in result.stdout
    assert call("--run", "case").exit_code == 1
    backend.op = ""
    assert call("--run", "case").exit_code == 0


@pytest.mark.usefixtures("registered")
def test_the_command_replays_crash_reproducers(
    folder: Path, program: Program, tokens: Tensor
) -> None:
    case = reproducer.Case(
        pass_=Rebuild(at="blocks.1.up"),
        program=program,
        inputs=[[tokens]],
        calibration=[],
        plan=None,
        seed=0,
        verify_each=True,
        error=("VerifyError", "rebuild moved an output"),
        versions={},
    )
    reproducer.write(reproducer.Reproducer(folder / "crash"), case)
    result = call("--run", "crash")
    assert result.exit_code == 1, result.output
    assert "rebuild promises exact results" in result.stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "give one of MODEL and --run DIR."),
        (("tiny.py:tiny",), "there is no recipe to bisect."),
        (("tiny.py:tiny", "--pass", "fuse-projections", "--metric", "mse"), "metric=mse"),
        (("tiny.py:tiny", "--pass", "fuse-projections", "--bound", "-1"), "is no error"),
        (("--run", "gone"), "gone"),
    ],
)
def test_mistakes_take_one_line(folder: Path, args: tuple[str, ...], text: str) -> None:
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert text in line
