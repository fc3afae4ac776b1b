"""Diffs: blocks matched, changes in words, region by region, node by node."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from blockwright.driver import cli
from blockwright.driver.bisect_pass import Applied
from blockwright.driver.diff import Diff, diff
from blockwright.driver.diff_align import align
from blockwright.ir.capture import capture
from blockwright.ir.ops import OPS, StructuralOp
from blockwright.ir.program import Program
from blockwright.ir.rewrite import rewrite
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass

SIZES = {"vocab": 64, "context": 16, "dim": 64, "heads": 4, "depth": 4, "ffn_dim": 128}
IDS = torch.arange(8).reshape(1, 8)


def model(**sizes: int) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**(SIZES | sizes))).eval()


@pytest.fixture(scope="module")
def old() -> Program:
    """Four blocks, width 64."""
    return capture(model(), (IDS,))


def rewritten(program: Program, pass_: Pass) -> Program:  # type: ignore[type-arg]
    return Applied.of(pass_, program, [[IDS]]).after()


def words(found: Diff) -> list[str]:
    return [str(change) for change in found.changes()]


def test_alignment_by_the_most_telling_key() -> None:
    keys = [lambda pair: pair[0], lambda pair: pair[1]]
    old, new = [("a", 1), ("b", 2), ("c", 3)], [("a", 1), ("x", 2), ("c", 9)]
    assert list(align(old, new, keys)) == list(zip(old, new, strict=True))
    assert list(align(old, old[1:], keys)) == [(old[0], None), *zip(old[1:], old[1:], strict=True)]
    assert list(align(old[:1], [("z", 9), ("y", 8)], keys)) == [
        (old[0], None), (None, ("z", 9)), (None, ("y", 8)),
    ]  # fmt: skip
    assert list(align([("a", 1)], [("z", 2)], keys)) == [(("a", 1), ("z", 2))]  # as many are left
    assert list(align([1, 2], [2, 1, 3], [lambda item: None])) == [
        (1, None), (2, None), (None, 2), (None, 1), (None, 3),
    ]  # fmt: skip


def test_a_program_equals_itself(old: Program) -> None:
    found = diff(old, old)
    assert found.equal
    assert (words(found), found.signature(), found.rows(), found.text()) == ([], [], [], "")
    assert found.to_json()["equal"] is True


def test_captured_twice_is_the_same(old: Program) -> None:
    assert diff(old, capture(model(), (IDS,))).equal


@pytest.mark.parametrize(
    ("pass_", "expected"),
    [
        (
            QuantizeWeights(group_size=32),
            ["blocks 0-3: 6 linear layers fp32 -> int8 weights (group 32); bytes -70 %"],
        ),
        (
            QuantizeWeights(bits=4, symmetric=False, include=("*.[23].*",)),
            [("blocks 2-3: 6 linear layers fp32 -> int4 weights"
              " (per channel, with zero points); bytes -84 %")],
        ),
        (
            QuantizeWeights(activations="int8", include=("blocks.3.up",)),
            ["block 3: 1 linear layer fp32 -> int8 weights and activations; bytes -18 %"],
        ),
        (FuseProjections(), ["blocks 0-3: q/k/v separate -> joined; linear layers 6 -> 4"]),
        (
            FuseProjections(include=("blocks.0.*", "blocks.2.*")),
            ["block 0: q/k/v separate -> joined; linear layers 6 -> 4",
             "block 2: q/k/v separate -> joined; linear layers 6 -> 4"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_passes_did(old: Program, pass_: Pass, expected: list[str]) -> None:  # type: ignore[type-arg]
    found = diff(old, rewritten(old, pass_))
    assert words(found) == expected
    assert not found.equal
    assert found.text()
    assert found.signature() == []


@torch.library.custom_op("blockwright_test::experts", mutates_args=())
def experts(x: Tensor, weight: Tensor, active: int) -> Tensor:
    return x.clone()


@experts.register_fake
def _(x: Tensor, weight: Tensor, active: int) -> Tensor:
    return torch.empty_like(x)


class Experts(nn.Module):
    """Stands for a method that this test invents."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.blockwright_test.experts(x, self.weight, 2)


def test_a_later_method_comes_with_its_own_words(
    old: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = StructuralOp(
        overload=torch.ops.blockwright_test.experts.default,
        flops=lambda shapes, output: {"linear": 4 * output[1] * 64 * 32},
        weights=lambda shapes, output: 0,
        backends=frozenset(),
        describe=lambda given: (
            "FFN",
            "{} experts x {}, top-{}".format(*given["weight"].shape[:2], given["active"]),
        ),
    )
    monkeypatch.setitem(OPS, str(op.overload), op)
    region = old.feed_forwards()[2]
    new = rewrite(old, [(region, Experts(8, 16))], by="test")
    assert words(diff(old, new)) == [
        "block 2: FFN 128 -> 8 experts x 16, top-2; FLOPs -36 %; bytes -25 %"
    ]


def test_structural_ops_describe_themselves() -> None:
    described = {name.split(".")[1]: op.describe for name, op in OPS.items()}
    assert described["quantized_embedding"]({}) == ("embedding tables", "int8 rows")
    assert all(described.values())


def test_dropped_blocks_are_dropped_and_nothing_else(old: Program) -> None:
    small = model()
    del small.blocks[0], small.blocks[1]  # blocks 0 and 2; the rest gets new numbers
    found = diff(old, capture(small, (IDS,)))
    assert words(found) == ["block 0: dropped", "block 2: dropped"]
    assert words(diff(capture(small, (IDS,)), old)) == ["block 0: added", "block 2: added"]
    summary = found.to_json()["summary"]
    assert [(each["old"], each["new"]) for each in summary] == [
        (["blocks.0"], []), (["blocks.2"], []),
    ]  # fmt: skip


def test_a_changed_block_that_got_a_new_number_says_so(old: Program) -> None:
    small = model()
    del small.blocks[0]
    small.blocks[2].up.weight.data += 1
    found = words(diff(old, capture(small, (IDS,))))
    assert found[0] == "block 0: dropped"
    assert found[1:] == ["block 3 (now block 2): weights differ in 1 tensor: up.weight"]


def test_other_sizes(old: Program) -> None:
    narrow = capture(model(ffn_dim=96), (IDS,))
    assert all(text.startswith("block") and "FFN 128 -> 96" in text and "FLOPs -12 %" in text
               for text in words(diff(old, narrow)))  # fmt: skip
    (text,) = words(diff(old, capture(model(heads=2), (IDS,))))
    assert text.startswith("blocks 0-3: attention heads 4 -> 2; attention kv heads 4 -> 2;")


def test_weights_that_differ(old: Program) -> None:
    other = model()
    other.blocks[2].attention.query.weight.data[0, 0] += 1e-3
    other.norm.bias.data += 1
    found = diff(old, capture(other, (IDS,)))
    assert words(found) == [
        "block 2: weights differ in 1 tensor: attention.query.weight",
        "outside blocks: weights differ in 1 tensor: norm.bias",
    ]
    assert (found.text(), found.rows()) == ("", [])
    assert not found.equal


def test_signatures_that_differ(old: Program) -> None:
    found = diff(old, capture(model(), (IDS[:, :6],)))
    assert found.signature() == [
        "inputs: tokens int64[1, 8] -> tokens int64[1, 6]",
        "outputs: float32[1, 8, 64] -> float32[1, 6, 64]",
    ]
    assert all("sizes, arguments or order of ops differ" in text for text in words(found))


def test_weights_without_data_are_not_compared(old: Program) -> None:
    meta = old.with_(tensors={name: tensor.to("meta") for name, tensor in old.tensors.items()})
    found = diff(old, meta, ("a", "b"))
    assert found.equal
    assert found.notes() == ["b has shapes and no weights, so values are not compared."]


def test_regions_side_by_side(old: Program) -> None:
    found = diff(old, rewritten(old, QuantizeWeights(include=("blocks.3.down",))))
    changed = [(row.block, row.old and row.old.words, row.new and row.new.words)
               for row in found.rows()]  # fmt: skip
    assert ("blocks.3", "fp32", "int8 weights (per channel)") in changed
    assert {block for block, _, _ in changed} == {"blocks.3"}
    assert len(found.rows(all_=True)) > 4 * 8
    data = found.rows(all_=True)[0].to_json()
    assert (data["role"], data["changed"]) == ("attention", False)
    assert data["old"]["constants"]["heads"] == 4


def test_a_split_class_shows_its_own_changes_alone(old: Program) -> None:
    found = diff(old, rewritten(old, FuseProjections(include=("blocks.3.*",))), ("a", "b"))
    lines = found.text().splitlines()
    assert "+++ b 1 x blocks.3" in lines
    assert not any("gelu" in line for line in lines if line[0] in "+-")


def test_main_graphs_without_blocks() -> None:
    one, two = (capture(torch.nn.Sequential(torch.nn.Linear(4, n), torch.nn.ReLU(),
                                            torch.nn.Linear(n, 4)), (torch.ones(1, 4),))
                for n in (8, 16))  # fmt: skip
    (text,) = words(diff(one, two))
    assert text.startswith("outside blocks: ")
    assert "FLOPs +" in text


MODEL = f"""
import torch
from blockwright.models.gpt import GPT, GPTConfig


class Offers(GPT):
    def example_inputs(self):
        return (torch.arange(8).reshape(1, 8),)


def tiny(**sizes):
    torch.manual_seed(0)
    return Offers(GPTConfig(**({SIZES} | {{'depth': 2}} | sizes)))


def narrow():
    return tiny(ffn_dim=64)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["diff", *args])


def test_the_command_at_three_levels(folder: Path) -> None:
    pair = ("tiny.py:tiny", "tiny.py:narrow")
    summary = call(*pair)
    assert summary.exit_code == 1, summary.output
    assert "FFN 128 -> 64" in summary.stdout
    assert "weight bytes" in summary.stdout
    nodes = call(*pair, "--level", "nodes").stdout
    assert "+++ tiny.py:narrow 2 x blocks.0 .. blocks.1" in nodes
    data = json.loads(call(*pair, "--json").stdout)
    assert data["equal"] is False
    assert {"summary", "signature", "cost", "regions", "diff", "notes"} <= data.keys()


def test_the_command_on_regions(folder: Path) -> None:
    pair = ("tiny.py:tiny", "tiny.py:narrow")
    regions = call(*pair, "--level", "regions").stdout
    assert "blocks.1.up" in regions
    assert "128 -> " in regions
    everything = call(*pair, "--level", "regions", "--all").stdout
    assert len(everything.splitlines()) > len(regions.splitlines())


def test_the_command_on_equal_models(folder: Path) -> None:
    result = call("tiny.py:tiny", "tiny.py:tiny")
    assert result.exit_code == 0, result.output
    assert "the same graphs and weights." in result.stdout


def test_an_unknown_level_is_refused(folder: Path) -> None:
    result = call("tiny.py:tiny", "tiny.py:tiny", "--level", "words")
    assert result.exit_code == 2
    assert "use summary, regions, nodes." in result.stderr
