"""What mutants of the driver showed to be untested elsewhere."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from blockwright.backends.plainjson import dumps
from blockwright.driver.manager import run_passes
from blockwright.driver.numerics import within_rounding
from blockwright.ir.errors import VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip

UNIT = torch.finfo(torch.float32).eps / 2


class Noisy(FuseProjections):
    """Draws random numbers."""

    def decide(self, region: Any) -> list[int] | Skip:
        random.random()
        return super().decide(region)


def test_a_pass_leaves_no_random_state_behind(program: Program) -> None:
    before = random.getstate()
    run_passes(program, [Noisy()])
    assert random.getstate() == before


def test_exact_means_a_few_roundings() -> None:
    truth = torch.ones(2000, dtype=torch.float64)
    old = (truth * (1 + 2 * 2 * UNIT)).float()  # two units above one
    assert within_rounding((truth * (1 + 10 * UNIT)).float(), old, truth)
    assert not within_rounding((truth * (1 + 40 * UNIT)).float(), old, truth)


def test_one_element_may_not_hide_among_many() -> None:
    truth = torch.ones(100_000, dtype=torch.float64)
    old, new = truth.float(), truth.float()
    new[0] += 100 * UNIT
    assert not within_rounding(new, old, truth)


@dataclass(frozen=True, kw_only=True)
class FirstIsOff(Pass[Linear, float]):
    """Promise that nothing moves, and move the first layer."""

    name: ClassVar[str] = "first-is-off"
    promise: ClassVar[Promise] = Promise.BOUNDED

    def decide(self, region: Linear) -> float | Skip:
        if not region.label.endswith(".up"):
            return Skip("is no up layer", at=region)
        return 1.01 if region.label == "blocks.0.up" else 1.0

    def replace(self, region: Linear, decision: float) -> nn.Module:
        layer = nn.Linear(region.weight.shape[1], region.weight.shape[0])
        layer.weight = nn.Parameter(region.weight * decision)
        assert region.bias is not None
        layer.bias = nn.Parameter(region.bias)
        return layer

    def bound(self, region: Linear, module: nn.Module, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64)


def test_every_region_is_held_to_its_bound(program: Program, tokens: Tensor) -> None:
    with pytest.raises(VerifyError, match="times as far as it promises") as caught:
        run_passes(program, [FirstIsOff()], [[tokens]])
    assert caught.value.where == "blocks.0.up"


def test_a_step_of_another_prefix_is_not_taken(
    program: Program, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ups, downs = (QuantizeWeights(include=(f"*.{name}",)) for name in ("up", "down"))
    run_passes(program, [ups, FuseProjections()], [[tokens]], checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FuseProjections, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_passes(program, [downs, FuseProjections()], [[tokens]], checkpoint=tmp_path)
    recipe = [downs, FuseProjections()]
    new, steps = run_passes(program, recipe, [[tokens]], checkpoint=tmp_path)
    assert [step.resumed for step in steps] == [True, False]
    assert new.text() == run_passes(program, recipe, [[tokens]])[0].text()


def test_candidates_are_what_was_changed_or_skipped(program: Program) -> None:
    _, (step,) = run_passes(program, [QuantizeWeights(include=("*.up",))])
    receipt = step.receipt
    assert receipt.skipped
    assert receipt.candidates == len(receipt.changed) + len(receipt.skipped)


def test_a_plan_is_carried_out_in_the_order_of_the_model(program: Program) -> None:
    _, (step,) = run_passes(program, [QuantizeWeights()])
    plan = step.plan.to_json()
    plan["decisions"] = dict(reversed(plan["decisions"].items()))
    _, (found,) = run_passes(program, [QuantizeWeights()], plans=[plan])
    assert found.receipt.changed == step.receipt.changed


def test_a_step_that_was_edited_is_run_again(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    recipe = [FuseProjections()]
    _, (first,) = run_passes(program, recipe, [[tokens]], checkpoint=tmp_path)
    (path,) = (tmp_path / "steps").iterdir()
    data = json.loads(path.read_text())
    step = json.loads(data["step"])
    step["receipt"]["candidates"] += 1
    path.write_bytes(dumps(data | {"step": json.dumps(step)}))
    _, (again,) = run_passes(program, recipe, [[tokens]], checkpoint=tmp_path)
    assert not again.resumed
    assert again.receipt == first.receipt
