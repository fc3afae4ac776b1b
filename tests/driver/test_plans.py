"""Evidence, plans from outside, recovery."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.calibration import CERTIFIED_SETS, CalibrationSets, calibration_sets
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.run import run
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Calibration, Evidence, Pass, Plan, Promise, Skip
from blockwright.passes.shared.codes import Codes
from blockwright.passes.shared.losses import output_mse
from blockwright.passes.shared.recovery import Stage


@dataclass(frozen=True, kw_only=True)
class Damp(Pass[Linear, float]):
    """Scale `up` layers by how much they were seen to put out, and train the scale back."""

    name: ClassVar[str] = "damp"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    train: bool = False

    def measure(self, program: Program, calibration: Calibration) -> Evidence:
        sums: dict[str, float] = {}
        samples = 0
        for flat in calibration:
            samples += 1
            run(program, flat, on_block=lambda name, out: sums.update(
                {name: sums.get(name, 0.0) + float(out[0].abs().mean())}))  # fmt: skip
        return Evidence(samples, sums)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[float]:
        assert evidence is not None
        return Plan(
            {
                region.label: round(0.9 + 0.01 * evidence.samples, 3)
                for region in self.regions(program)
                if region.label.endswith("up")
            }
        )

    def decide(self, region: Linear) -> float | Skip:
        raise NotImplementedError

    def replace(self, region: Linear, decision: float) -> nn.Module:
        return Damped(region.weight, region.bias, decision)

    def recovery(self, old: Program, new: Program, plan: Plan[float]) -> Sequence[Stage]:
        if not self.train:
            return ()
        factors = {name: None for name in new.tensors if name.endswith("factor")}
        return [
            Stage(name="undo", weights=factors, loss=output_mse(old, new), epochs=60, rate=1e-2)
        ]

    def statistics(self, plan: Plan[float]) -> Mapping[str, int]:
        return {"damped": len(plan.decisions)}


class Damped(nn.Module):
    factor: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, factor: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias if bias is None else nn.Parameter(bias)
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.factor


def test_evidence_reaches_the_plan(program: Program, tokens: Tensor) -> None:
    stream = [[tokens], [tokens.flip(0)], [tokens.flip(1)]]
    _, (step,) = run_passes(program, [Damp()], [[tokens]], calibration=stream)
    assert set(step.plan.decisions.values()) == {0.93}
    assert step.receipt.statistics == {"damped": 3}
    assert {"measure", "plan", "rewrite", "recover", "verify", "certify"} <= step.seconds.keys()


def test_recovery_gives_better_weights_to_the_same_graphs(program: Program, tokens: Tensor) -> None:
    _, (before,) = run_passes(program, [Damp()], [[tokens]], calibration=[[tokens]])
    new, (after,) = run_passes(program, [Damp(train=True)], [[tokens]], calibration=[[tokens]])
    assert before.certificate
    assert after.certificate
    errors = [step.certificate.outputs["output"].difference for step in (before, after)]
    assert errors[1] < 0.3 * errors[0]
    (trained,) = after.receipt.trained
    assert (trained.stage, trained.steps, trained.parameters, trained.kept) == ("undo", 60, 3, True)
    assert trained.after < 0.1 * trained.before
    held = [name for name in program.tensors if not name.endswith("up.weight")]
    assert all(new.tensors[name] is program.tensors[name] for name in held if name in new.tensors)


def test_without_calibration_nothing_is_trained(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [Damp(train=True)], [[tokens]])
    assert step.receipt.trained == ()


def test_a_replayed_plan_gives_the_same_program(program: Program, tokens: Tensor) -> None:
    recipe = [FuseProjections(), QuantizeWeights(bits=4, group_size=4)]
    first, steps = run_passes(program, recipe, [[tokens]])
    saved = json.loads(json.dumps([step.plan.to_json() for step in steps]))
    again, replayed = run_passes(program, recipe, [[tokens]], plans=saved)
    assert again.text() == first.text()
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert [step.plan for step in replayed] == [step.plan for step in steps]
    assert isinstance(next(iter(replayed[1].plan.decisions.values())), Codes)


def test_an_edited_plan_is_carried_out(program: Program) -> None:
    _, (step,) = run_passes(program, [QuantizeWeights()])
    edited = step.plan.to_json()
    kept = next(iter(edited["decisions"]))
    edited["decisions"] = {kept: {**edited["decisions"][kept], "bits": 4, "group_size": 2}}
    _, (found,) = run_passes(program, [QuantizeWeights()], plans=[edited])
    assert found.receipt.changed == (kept,)
    assert found.plan.decisions[kept] == Codes(4, 2, True)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "this is no plan of quantize-weights"),
        ([1], "this is no plan of quantize-weights"),
        ({"decisions": {"gone": {"bits": 8, "group_size": 4, "symmetric": True}}},
         "decides about 'gone', which is no place"),
        ({"decisions": {"head": {"bits": "8"}}}, "quantize-weights cannot decide"),
        ({"decisions": {"head": 3}, "more": 1}, "this is no plan of quantize-weights"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(program: Program, plan: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_passes(program, [QuantizeWeights()], plans=[plan])


def test_plans_come_from_an_artefact(program: Program, tokens: Tensor, tmp_path: Path) -> None:
    engine = bw.compile(program, 'quantize-weights{include=["*.up"]}', (tokens,), backend="eager")
    engine.save(tmp_path / "a.bw")
    again = bw.compile(program, "quantize-weights", (tokens,), plans=tmp_path / "a.bw",
                       backend="eager")  # fmt: skip
    assert again.program.text() == engine.program.text()
    with pytest.raises(OptionError, match="and the recipe is fuse-projections"):
        bw.compile(program, "fuse-projections", plans=tmp_path / "a.bw", backend="eager")
    with pytest.raises(OptionError, match="holds no plan"):
        bw.compile(program, "fuse-projections", plans=tmp_path / "none", backend="eager")
    with pytest.raises(OptionError, match="there are 2 plans for 1 passes"):
        bw.compile(program, "fuse-projections", plans=[None, None], backend="eager")


class Endless:
    """Gives batches for ever, to whoever asks again."""

    def __init__(self, batch: Tensor) -> None:
        self.batch, self.given = batch, 0

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        while True:
            self.given += 1
            yield (self.batch,)


def test_calibration_is_streamed_and_bounded(
    program: Program, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockwright.driver.calibration.CALIBRATION_LIMIT", 7)
    source = Endless(tokens)
    assert sum(1 for _ in CalibrationSets(program, source)) == 7
    inputs, stream = calibration_sets(program, [tokens], source)
    assert len(inputs) == 1 + CERTIFIED_SETS
    assert sum(1 for _ in stream) == sum(1 for _ in stream) == 7


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the calibration holds no inputs"),
        ([torch.zeros(2, 8)], "calibration batch 0"),
        ([torch.zeros(2, 8).long(), torch.zeros(3).long()], "calibration batch 1"),
    ],
)
def test_bad_calibration_is_named(program: Program, batches: list[Tensor], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bw.compile(program, "fuse-projections", calibration=batches, backend="eager")


def test_nan_in_calibration_is_named() -> None:
    with pytest.raises(OptionError, match="it holds NaN or infinity"):
        bw.compile(nn.Linear(2, 2), "quantize-weights", (torch.zeros(1, 2),), backend="eager",
                   calibration=[torch.full((1, 2), float("nan"))])  # fmt: skip
