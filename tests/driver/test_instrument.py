"""What is shown while passes run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import Tensor

from blockwright.driver.instrument import Instruments
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.passes import FoldConstants, FuseProjections, QuantizeWeights

RECIPE = [FuseProjections(), FoldConstants(), FoldConstants(allow_no_match=True)]


def shown(program: Program, recipe: Any = None, inputs: Any = (), **options: Any) -> dict[str, str]:
    said: dict[str, str] = {}

    def say(title: str, text: str) -> None:
        said[title] = text

    run_passes(program, RECIPE if recipe is None else recipe, inputs,
               instruments=Instruments(say=say, **options))  # fmt: skip
    return said


def test_graphs_are_printed_before_and_after(program: Program) -> None:
    fused, _ = run_passes(program, [FuseProjections()])
    assert shown(program) == {}
    found = shown(program, print_ir_after="fuse-projections")
    assert found == {"after fuse-projections": fused.text()}
    found = shown(program, print_ir_before=["fuse-projections"])
    assert found == {"before fuse-projections": program.text()}
    assert list(shown(program, print_ir_after=True, print_ir_before=True)) == [
        "before fuse-projections", "after fuse-projections",
        "before fold-constants", "after fold-constants",
    ]  # fmt: skip


def test_only_changes_are_printed_when_asked(program: Program) -> None:
    folded, _ = run_passes(program, [FoldConstants()])
    idle = [FoldConstants(allow_no_match=True)]
    assert shown(folded, idle, print_ir_after=True) == {"after fold-constants": folded.text()}
    assert shown(folded, idle, print_ir_after=True, print_ir_after_change=True) == {}
    assert list(shown(program, print_ir_after_change=True)) == [
        "after fuse-projections", "after fold-constants"
    ]  # fmt: skip


def test_what_a_failing_pass_was_given_is_printed(program: Program) -> None:
    said: dict[str, str] = {}
    fused, _ = run_passes(program, [FuseProjections()])
    instruments = Instruments(print_ir_after_failure=True, say=said.__setitem__)
    with pytest.raises(NoMatchError):
        run_passes(program, [FuseProjections(), QuantizeWeights(include=("x",))],
                   instruments=instruments)  # fmt: skip
    assert said == {"after failure of quantize-weights": fused.text()}


def test_a_pass_that_does_not_run_cannot_be_watched(program: Program) -> None:
    with pytest.raises(OptionError, match="no pass 'canonicalize' runs"):
        shown(program, print_ir_after="canonicalize")


def test_times_stand_by_stage(program: Program, tokens: Tensor) -> None:
    text = shown(program, inputs=[[tokens]], timing=True)["execution time"]
    head, *rows, total = text.splitlines()
    columns = ["measure", "plan", "rewrite", "verify", "certify", "total", "nodes"]
    assert all(column in head for column in columns)
    assert len(rows) == 3
    assert total.startswith("total")
    before, after = program.nodes(), run_passes(program, RECIPE[:1])[0].nodes()
    assert rows[0].rstrip().endswith(f"{before} -> {after}")


def test_statistics_are_counted(program: Program) -> None:
    text = shown(program, statistics=True)["pass statistics"]
    assert text.splitlines()[:4] == [
        "fuse-projections", "           3 candidates", "           3 changed",
        "           0 skipped",
    ]  # fmt: skip


def test_the_log_is_the_default(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blockwright.passes"):
        run_passes(program, [FuseProjections()], print_ir_after=True)
    assert any(m.startswith("after fuse-projections:\n") for m in caplog.messages)
