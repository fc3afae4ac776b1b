"""`blockwright compile` and `verify`: orders, plans, instruments, cases, checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from blockwright.driver import cli
from blockwright.driver.reproducer import replay

MODEL = """
import torch
from blockwright.models.gpt import GPT, GPTConfig


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=2, ffn_dim=12)).eval()


def other():
    return tiny(1)
"""
BACKWARDS = ("--pass", "quantize-weights", "--pass", "fuse-projections")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def compiled(*args: str) -> Result:
    return call("compile", "tiny.py:tiny", "-o", "a.bw", "--backend", "eager", *args)


def record(*args: str) -> Any:
    result = compiled(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["record"]


def test_orders_are_solved_or_refused(folder: Path) -> None:
    refused = compiled(*BACKWARDS)
    assert refused.exit_code == 2
    assert "quantize-weights packs the weights that fuse-projections must join" in refused.stderr
    found = record(*BACKWARDS, "--order", "auto")
    assert (found["recipe"], found["order"]) == ("fuse-projections, quantize-weights", "auto")


def test_plans_are_carried_out(folder: Path) -> None:
    first = record("--pass", "quantize-weights")
    (plan,) = Path("a.bw").glob("plan.*.json")
    edited = json.loads(plan.read_text())
    decisions = edited["steps"][0]["plan"]["decisions"]
    kept = {label: decisions[label] for label in list(decisions)[:2]}
    edited["steps"][0]["plan"]["decisions"] = kept
    Path("edited.json").write_text(json.dumps(edited))
    found = record("--pass", "quantize-weights", "--plan", "edited.json")
    assert set(found["steps"][0]["receipt"]["changed"]) == set(kept)
    assert len(first["steps"][0]["receipt"]["changed"]) > 2


def test_instruments_print_on_stderr(folder: Path) -> None:
    result = compiled("--pass", "fuse-projections", "--print-ir-after", "fuse-projections",
                      "--print-ir-before-all", "--timing", "--pass-statistics")  # fmt: skip
    assert result.exit_code == 0, result.output
    titles = [line for line in result.stderr.splitlines() if line.startswith("// ")]
    assert titles == ["// before fuse-projections", "// after fuse-projections",
                      "// execution time", "// pass statistics"]  # fmt: skip
    assert "def main(" in result.stderr
    assert "def main(" not in result.stdout


def test_a_failing_pass_leaves_a_case(folder: Path) -> None:
    result = compiled("--pass", 'quantize-weights{include=["gone"]}', "--crash-reproducer", "case")
    assert result.exit_code == 2
    assert "replay it with `blockwright bisect --run case`" in result.stderr
    assert replay("case").same


def test_a_checkpoint_is_continued(folder: Path) -> None:
    assert compiled("--pass", "fuse-projections", "--checkpoint", "kept").exit_code == 0
    result = compiled("--pass", "fuse-projections", "--pass", "quantize-weights", "--checkpoint",
                      "kept")  # fmt: skip
    assert "continued after fuse-projections" in result.stderr


def test_weights_are_trained_back_or_taken_from_an_engine(folder: Path) -> None:
    example = torch.arange(32).reshape(2, 16)
    save_file({"tokens": example}, "more.safetensors")
    recipe = ("--pass", "share-blocks", "--calibration", "more.safetensors", "--json")

    def trained(*options: str) -> list[dict[str, Any]]:
        result = compiled(*recipe, *options)
        assert result.exit_code == 0, result.output
        (step,) = json.loads(result.stdout)["record"]["steps"]
        return step["receipt"]["trained"]

    assert trained("--no-recover") == []
    (made,) = trained("--recover-steps", "3")
    assert made["steps"] == 3
    Path("a.bw").rename("first.bw")
    (taken,) = trained("--recover-weights", "first.bw")
    assert taken["steps"] == 0
    assert taken["after"] == pytest.approx(made["after"] if made["kept"] else made["before"])


def test_verify_says_whether_an_engine_is_what_it_claims(folder: Path) -> None:
    record("--pass", "fuse-projections", "--pass", "quantize-weights")
    good = call("verify", "a.bw", "tiny.py:tiny")
    assert good.exit_code == 0, good.output
    assert "everything is as claimed." in good.stdout
    bad = call("verify", "a.bw", "tiny.py:other", "--json")
    assert bad.exit_code == 1
    found = json.loads(bad.stdout)
    assert (found["ok"], found["disagreements"][0]["where"]) == (False, "blocks.0")
    shown = call("verify", "a.bw", "tiny.py:other")
    assert "verification failed." in shown.stdout
    assert "blocks.0" in shown.stdout


def test_verify_refuses_what_it_cannot_compare(folder: Path) -> None:
    result = call("verify", "tiny.py:tiny", "tiny.py:tiny")
    assert result.exit_code == 2
    assert "or a saved engine and the model it was made of" in result.stderr
