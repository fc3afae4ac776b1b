"""Whatever happens to a pass, the old program and the user's module stay as they were."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import blockwright
import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.models.gpt import GPT
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Calibration, Evidence, Pass, Plan, Promise, Skip
from blockwright.passes.shared.recovery import Stage as Training

ROOT = str(Path(blockwright.__file__).parent)
WATCHED = tuple(f"{ROOT}/{folder}/" for folder in ("driver", "ir", "passes"))
ERRORS = [KeyboardInterrupt, MemoryError, RuntimeError]


def fingerprint(program: Program) -> str:
    digest = hashlib.sha256(program.text().encode())
    for name, tensor in program.tensors.items():
        digest.update(f"{name} {tensor.data_ptr()}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(repr((sorted(program.aliases.items()), sorted(program.parameters))).encode())
    return digest.hexdigest()


def module_fingerprint(model: nn.Module) -> Any:
    state = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    modules = {name: (type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    text = [(name, place, tensor.numpy().tobytes()) for name, (place, tensor) in state.items()]
    return text, modules, hooks


class Bomb:
    """Raises in the n-th call of a function of ours; counts calls when n is None."""

    def __init__(self, at: int | None, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(WATCHED):
            self.calls += 1
            if self.calls == self.at:
                raise self.error("planted")

    def during(self, call: Callable[[], object]) -> None:
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(None)


RECIPE = [FuseProjections(), QuantizeWeights(activations="int8")]


def strike(program: Program, tokens: Tensor, points: list[int]) -> None:
    before, raised = fingerprint(program), 0
    for index, at in enumerate(points):
        bomb = Bomb(at, ERRORS[index % len(ERRORS)])
        caught: BaseException | None = None
        try:
            bomb.during(lambda: run_passes(program, RECIPE, [[tokens]]))
        except BaseException as error:
            caught = error
        if caught is not None:
            raised += 1
            assert bomb.error in (type(caught), type(caught.__cause__))
        assert fingerprint(program) == before
    # Not every bomb goes off: graphs remember what was found, and destructors ignore errors.
    assert raised >= len(points) * 2 // 3
    run_passes(program, RECIPE, [[tokens]])  # and it still works


def count(program: Program, tokens: Tensor) -> int:
    bomb = Bomb(None)
    bomb.during(lambda: run_passes(program, RECIPE, [[tokens]]))
    return bomb.calls


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_anywhere_leaves_the_program(program: Program, tokens: Tensor) -> None:
    calls = count(program, tokens)
    assert calls > 1000
    strike(program, tokens, [1 + i * (calls - 2) // 14 for i in range(15)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_at_random_points_leaves_the_program(program: Program, tokens: Tensor) -> None:
    draw = random.Random(0)
    strike(program, tokens, [draw.randrange(1, count(program, tokens)) for _ in range(60)])


@dataclass(frozen=True, kw_only=True)
class Stage(Pass[Linear, int]):
    """Raise in one of the five steps."""

    name: ClassVar[str] = "stage"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    at: str = ""
    error: type[BaseException] = RuntimeError

    def _reach(self, stage: str) -> None:
        torch.randn(1)
        random.random()
        if stage == self.at:
            raise self.error("planted")

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        self._reach("measure")
        return None

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[int]:
        self._reach("plan")
        return super().plan(program)

    def decide(self, region: Linear) -> int | Skip:
        self._reach("decide")
        return 0

    def replace(self, region: Linear, decision: int) -> nn.Module:
        self._reach("replace")
        return Same(region.weight, region.bias)

    def recovery(self, old: Program, new: Program, plan: Plan[int]) -> Sequence[Training]:
        self._reach("recovery")
        return ()


class Same(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", ["measure", "plan", "decide", "replace", "recovery"])
def test_every_step_fails_clean(
    gpt: GPT, tokens: Tensor, program: Program, stage: str, error: type[BaseException]
) -> None:
    model, before = module_fingerprint(gpt), fingerprint(program)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr] # noqa: NPY002
    with pytest.raises(error, match="planted"):
        run_passes(program, [Stage(at=stage, error=error)], [[tokens]], calibration=[[tokens]])
    assert fingerprint(program) == before
    assert module_fingerprint(gpt) == model
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index,union-attr] # noqa: NPY002


def test_compile_leaves_the_module(gpt: GPT, tokens: Tensor) -> None:
    before = module_fingerprint(gpt)
    with pytest.raises(KeyboardInterrupt):
        bw.compile(gpt, [FuseProjections(), Stage(at="replace", error=KeyboardInterrupt)],
                   (tokens,), backend="eager")  # fmt: skip
    assert module_fingerprint(gpt) == before
    bw.compile(gpt, [Stage(), QuantizeWeights()], (tokens,), backend="eager")
    assert module_fingerprint(gpt) == before


@dataclass(frozen=True, kw_only=True)
class Noise(Stage):
    """Draw random numbers."""

    name: ClassVar[str] = "noise"

    def replace(self, region: Linear, decision: int) -> nn.Module:
        return Same(torch.randn(region.weight.shape), region.bias)


def test_random_passes_repeat_themselves(program: Program, tokens: Tensor) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.randn(seed + 3)
        return dict(run_passes(program, [Noise()], [[tokens]], seed=seed)[0].tensors)

    one, two, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@dataclass(frozen=True, kw_only=True)
class Scribble(Stage):
    """Write into the weights it was given."""

    name: ClassVar[str] = "scribble"

    def replace(self, region: Linear, decision: int) -> nn.Module:
        region.weight.mul_(1.0)
        return Same(region.weight, region.bias)


def test_writing_into_the_old_weights_is_noticed(program: Program, tokens: Tensor) -> None:
    with pytest.raises(VerifyError, match=r"scribble wrote into the weight '.*'"):
        run_passes(program, [Scribble()], [[tokens]])
