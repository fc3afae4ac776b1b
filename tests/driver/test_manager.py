"""The pass manager: transactions, promises, receipts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver.certify import relative, within_rounding
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.run import run
from blockwright.passes import FoldConstants, FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip


@dataclass(frozen=True, kw_only=True)
class Scale(Pass[Linear, float]):
    """Multiply the output of `up` layers by a factor: exact only for 1."""

    name: ClassVar[str] = "scale"
    promise: ClassVar[Promise] = Promise.EXACT
    factor: float = 1.0

    def decide(self, region: Linear) -> float | Skip:
        if not region.label.endswith("up"):
            return Skip("is no up layer", at=region)
        return self.factor

    def replace(self, region: Linear, decision: float) -> nn.Module:
        return Scaled(region.weight, region.bias, decision)


class Scaled(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, factor: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias if bias is None else nn.Parameter(bias)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.factor


def test_an_exact_pass_that_is_not_fails_and_leaves_the_program(
    program: Program, tokens: Tensor
) -> None:
    text, before = program.text(), run(program, [tokens])[0]
    with pytest.raises(VerifyError, match="scale promises exact results and moved output"):
        run_passes(program, [Scale(factor=1.01)], [[tokens]])
    assert program.text() == text
    assert torch.equal(run(program, [tokens])[0], before)


def test_an_exact_pass_that_is_exact_passes(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [Scale()], [[tokens]])
    assert step.receipt.candidates == 19
    assert len(step.receipt.skipped) == 16


@dataclass(frozen=True, kw_only=True)
class Poison(Scale):
    """Divide by zero."""

    name: ClassVar[str] = "poison"
    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def replace(self, region: Linear, decision: float) -> nn.Module:
        return Scaled(region.weight, region.bias, float("inf"))


def test_nan_is_never_a_result(program: Program, tokens: Tensor) -> None:
    with pytest.raises(VerifyError, match="infinite or NaN"):
        run_passes(program, [Poison()], [[tokens]])


@dataclass(frozen=True, kw_only=True)
class Overpromise(Scale):
    """Claim a bound of nothing."""

    name: ClassVar[str] = "overpromise"
    promise: ClassVar[Promise] = Promise.BOUNDED

    def bound(self, region: Linear, module: nn.Module, x: Tensor) -> Tensor:
        return torch.zeros(())


def test_a_broken_bound_fails(program: Program, tokens: Tensor) -> None:
    with pytest.raises(VerifyError, match="times as far as it promises") as caught:
        run_passes(program, [Overpromise(factor=1.5)], [[tokens]])
    assert caught.value.where is not None
    assert caught.value.where.endswith("up")


@dataclass(frozen=True, kw_only=True)
class Crash(Scale):
    """Raise on the n-th replacement."""

    name: ClassVar[str] = "crash"
    at: int = 0

    def replace(self, region: Linear, decision: float) -> nn.Module:
        if region.label == f"blocks.{self.at}.up":
            raise ZeroDivisionError("planted")
        return super().replace(region, decision)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_exception_anywhere_leaves_the_program(program: Program, at: int) -> None:
    text, names = program.text(), set(program.tensors)
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        run_passes(program, [Crash(at=at)])
    assert "while running the pass crash" in caught.value.__notes__[0]
    assert (program.text(), set(program.tensors)) == (text, names)


def test_an_empty_recipe_changes_nothing(program: Program) -> None:
    same, steps = run_passes(program, [])
    assert same is program
    assert steps == []


def test_passes_compose(program: Program, tokens: Tensor) -> None:
    recipe = [FoldConstants(), FuseProjections(), QuantizeWeights(activations="int8")]
    new, steps = run_passes(program, recipe, [[tokens], [tokens.flip(0)]])
    assert [len(step.receipt.changed) for step in steps] == [1, 3, 12]
    assert all(step.certificate is not None and step.certificate.inputs == 2 for step in steps)
    assert relative(run(new, [tokens])[0], run(program, [tokens])[0]) < 0.05
    assert new.nodes() == program.nodes() + steps[-1].receipt.nodes[1] - steps[0].receipt.nodes[0]


def test_two_runs_give_the_same_bytes(program: Program) -> None:
    recipe = [FuseProjections(), QuantizeWeights(bits=4, group_size=4)]
    one, two = run_passes(program, recipe)[0], run_passes(program, recipe)[0]
    assert one.text() == two.text()
    assert list(one.tensors) == list(two.tensors)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize(
    ("error", "accepted"), [(0.0, True), (1e-7, True), (1e-5, False), (1e-2, False)]
)
def test_rounding_rule(error: float, accepted: bool) -> None:
    truth = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old = truth.float()
    assert within_rounding(old * (1 + error), old, truth) is accepted


def test_one_wrong_element_is_seen() -> None:
    truth = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old = truth.float()
    new = old.clone()
    new[7] += 1e-3
    assert not within_rounding(new, old, truth)
