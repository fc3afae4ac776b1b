"""A failing pass leaves a case, and the case fails again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver import reproducer
from blockwright.driver.manager import run_passes
from blockwright.driver.reproducer import Reproducer, read, replay
from blockwright.ir.errors import ArtefactError, NoMatchError, OptionError, VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.passes import FoldConstants, FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip


@dataclass(frozen=True, kw_only=True)
class Break(Pass[Linear, float]):
    """Fail in one of several ways."""

    name: ClassVar[str] = "break"
    promise: ClassVar[Promise] = Promise.EXACT
    how: str = "crash"
    factor: float = 1.5

    def decide(self, region: Linear) -> float | Skip:
        if not region.label.endswith("up"):
            return Skip("is no up layer", at=region)
        return self.factor

    def replace(self, region: Linear, decision: float) -> nn.Module:
        if self.how == "crash":
            raise ZeroDivisionError(f"planted at {region.label}, {torch.rand(1).item()}")
        layer = nn.Linear(*reversed(region.weight.shape))
        layer.weight = nn.Parameter(region.weight * decision, requires_grad=False)
        return layer if self.how == "move" else nn.Sequential(layer, nn.Flatten())


WAYS = [("crash", ZeroDivisionError), ("move", VerifyError), ("shape", VerifyError)]


@pytest.mark.parametrize(("how", "error"), WAYS)
def test_a_case_fails_again(
    program: Program, tokens: Tensor, tmp_path: Path, how: str, error: type[Exception]
) -> None:
    folder = tmp_path / "case"
    recipe = [FoldConstants(allow_no_match=True), FuseProjections(), Break(how=how)]
    with pytest.raises(error) as caught:
        run_passes(program, recipe, [[tokens]], reproducer=folder)
    assert any("blockwright bisect --run" in note for note in caught.value.__notes__)
    found = replay(folder, [Break])
    assert found.same, str(found)
    assert type(found.error) is error
    assert str(found).endswith("replayed: the same error")
    assert found.case.pass_ == Break(how=how)
    assert set(found.case.plan.decisions) == {f"blocks.{i}.up" for i in range(3)}  # type: ignore[union-attr]


def test_a_case_holds_what_the_failing_pass_was_given(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    fused, _ = run_passes(program, [FuseProjections()], [[tokens]])
    with pytest.raises(ZeroDivisionError):
        run_passes(program, [FuseProjections(), Break()], [[tokens]], reproducer=tmp_path,
                   calibration=[[tokens.flip(0)]], seed=3)  # fmt: skip
    case = read(tmp_path, [Break])
    assert case.program.text() == fused.text()
    assert all(torch.equal(case.program.tensors[n], fused.tensors[n]) for n in fused.tensors)
    assert torch.equal(case.inputs[0][0], tokens)
    assert torch.equal(case.calibration[0][0], tokens.flip(0))
    assert (case.seed, case.verify_each) == (3, True)
    assert case.versions["torch"] == torch.__version__


@pytest.mark.parametrize("reason", ["asked", "size"])
def test_a_case_without_weights_replays_on_zeros(
    program: Program, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "size":
        monkeypatch.setattr(reproducer, "WEIGHTS_LIMIT_BYTES", 100)
    case = Reproducer(tmp_path / "case", weights=False if reason == "asked" else None)
    with pytest.raises(VerifyError, match="break changed the output"):
        run_passes(program, [Break(how="shape")], [[tokens]], reproducer=case)
    assert not list(case.folder.glob("weights*"))
    found = replay(case.folder, [Break])
    assert not any(tensor.any() for tensor in found.case.program.tensors.values())
    assert found.same


def test_a_program_on_meta_stays_there(program: Program, tmp_path: Path) -> None:
    meta = program.with_(tensors={n: t.to("meta") for n, t in program.tensors.items()})
    with pytest.raises(ZeroDivisionError):
        run_passes(meta, [Break()], reproducer=tmp_path)
    assert all(t.is_meta for t in read(tmp_path, [Break]).program.tensors.values())


def test_a_case_that_no_longer_fails_says_so(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        run_passes(program, [Break()], [[tokens]], reproducer=tmp_path)

    @dataclass(frozen=True, kw_only=True)
    class Fixed(Break):
        promise: ClassVar[Promise] = Promise.APPROXIMATE

        def replace(self, region: Linear, decision: float) -> nn.Module:
            layer = nn.Linear(*reversed(region.weight.shape))
            layer.weight = nn.Parameter(region.weight, requires_grad=False)
            return layer

    found = replay(tmp_path, [Fixed])
    assert not found.same
    assert str(found).endswith("replayed: no error")


def test_errors_of_the_user_are_cases_too(program: Program, tmp_path: Path) -> None:
    passes = [QuantizeWeights(include=("nowhere",))]
    with pytest.raises(NoMatchError):
        run_passes(program, passes, reproducer=tmp_path / "a")
    assert replay(tmp_path / "a").same


def test_a_new_case_replaces_the_old_one_and_nothing_else(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "case"
    for factor in (1.5, 2.0):
        with pytest.raises(ZeroDivisionError):
            run_passes(program, [Break(factor=factor)], [[tokens]], reproducer=folder)
    assert read(folder, [Break]).pass_ == Break(factor=2.0)
    assert len(list(folder.iterdir())) == 5
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary")
    with pytest.raises(ZeroDivisionError) as caught:
        run_passes(program, [Break()], [[tokens]], reproducer=foreign)
    assert "no reproducer was written" in caught.value.__notes__[-1]
    assert [path.name for path in foreign.iterdir()] == ["diary.txt"]


def test_a_damaged_or_foreign_directory_is_refused(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError):
        replay(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_passes(program, [Break()], [[tokens]], reproducer=tmp_path)
    with pytest.raises(OptionError, match="there is no pass 'break'"):
        replay(tmp_path)
    (case,) = tmp_path.glob("case.*")
    case.write_text(json.dumps({**json.loads(case.read_text()), "seed": 1}))
    with pytest.raises(ArtefactError, match="not as it was saved"):
        replay(tmp_path, [Break])
