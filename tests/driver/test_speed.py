"""What made its block slower is taken back, and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver.manager import run_passes
from blockwright.driver.measure import Comparison, Timing
from blockwright.driver.speed import SpeedGuard
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.run import run
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip


def guard(speedup: float, noise: float = 1.0) -> SpeedGuard:
    """A guard on a machine where everything new is so many times faster."""

    def compare(calls: Mapping[str, Callable[[], object]]) -> Comparison:
        for call in calls.values():
            call()
        spread = (speedup * 0.9, speedup * 1.1)
        new = Timing(1.0 / speedup, speedup, spread, (1.0,))
        return Comparison({"old": Timing(1.0, 1.0, (1.0, 1.0), (1.0,)), "new": new}, 9, noise)

    return SpeedGuard("eager", compare=compare)


@pytest.mark.parametrize(
    ("speedup", "noise", "kept"), [(2.0, 1.0, 3), (0.5, 1.0, 0), (0.95, 1.0, 3), (0.5, 2.0, 3)]
)
def test_slower_blocks_are_put_back(
    program: Program, tokens: Tensor, speedup: float, noise: float, kept: int
) -> None:
    new, (step,) = run_passes(program, [FuseProjections()], [[tokens]], speed=guard(speedup, noise))
    assert len(step.receipt.changed) == kept
    assert len(step.receipt.skipped) == 3 - kept
    assert (new is program) == (kept == 0)
    for reason in step.receipt.skipped.values():
        assert reason == "made blocks.0 2.00 times slower on eager"
    assert list(step.plan.decisions) == list(step.receipt.changed)


def test_what_lies_outside_blocks_stays(program: Program, tokens: Tensor) -> None:
    method = QuantizeWeights(embeddings=True, include=("*.up", "positions*", "*position*"))
    new, (step,) = run_passes(program, [method], [[tokens]], speed=guard(0.5))
    assert all(not label.startswith("blocks") for label in step.receipt.changed)
    assert len(step.receipt.skipped) >= 3
    assert run(new, [tokens])[0].shape == run(program, [tokens])[0].shape


def test_a_flat_model_is_judged_whole() -> None:
    x = torch.randn(2, 4)
    flat = capture(nn.Linear(4, 4), (x,))
    same, (step,) = run_passes(flat, [QuantizeWeights()], [[x]], speed=guard(0.5))
    assert same is flat
    assert "made the model 2.00 times slower" in next(iter(step.receipt.skipped.values()))


@dataclass(frozen=True, kw_only=True)
class Waste(Pass[Linear, int]):
    """Multiply `up` layers many times over."""

    name: ClassVar[str] = "waste"
    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def decide(self, region: Linear) -> int | Skip:
        return 60 if region.label.endswith("up") else Skip("is no up layer", at=region)

    def replace(self, region: Linear, decision: int) -> nn.Module:
        return Wasteful(region.weight, region.bias, decision)


class Wasteful(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, times: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias if bias is None else nn.Parameter(bias)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        for _ in range(self.times):
            y = y + 0.0 * nn.functional.linear(x, self.weight, self.bias)
        return y


@pytest.mark.slow
def test_real_waste_is_found(program: Program, tokens: Tensor) -> None:
    for _ in range(3):  # a noisy machine gives no verdict
        new, _ = run_passes(program, [Waste()], [[tokens]], speed=SpeedGuard("eager"))
        if new is program:
            return
    pytest.fail("60 products instead of one were never found slower")
