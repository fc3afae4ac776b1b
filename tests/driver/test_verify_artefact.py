"""A saved engine against its model, no stored number trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.backends.artefact import load, save
from blockwright.driver.calibration import example_set
from blockwright.driver.verify_artefact import Verification, verify_artefact
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig

RECIPE = "fuse-projections, quantize-weights"


@pytest.fixture(scope="module")
def artefact(program: Program, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "a.bw"
    bw.compile(program, RECIPE, (tokens,), backend="eager").save(folder)
    return folder


def check(path: Path, program: Program, tokens: Tensor) -> Verification:
    return verify_artefact(path, program, [example_set(program, program, (tokens,))])


def changed(path: Path, folder: Path, **record: Any) -> Path:
    """Save an artefact again with another record, hashes and all."""
    engine = load(path, backend="eager")
    engine.record |= record
    save(engine, folder / "b.bw")
    return folder / "b.bw"


def test_an_honest_artefact_is_as_claimed(artefact: Path, program: Program, tokens: Tensor) -> None:
    found = check(artefact, program, tokens)
    assert found.ok, found.disagreements
    assert found.notes == ()
    assert found.certificate.blocks_exact.keys() == program.instances.keys()
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_other_inputs_are_no_reason_to_disagree(
    artefact: Path, program: Program, tokens: Tensor
) -> None:
    found = check(artefact, program, tokens.flip(0))
    assert found.ok
    assert "certified on other inputs" in found.notes[0]


def test_a_changed_weight_is_found_and_its_block_named(
    artefact: Path, program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    engine = load(artefact, backend="eager")
    name = next(n for n in engine.program.tensors if n.startswith("blocks.1") and "up" in n)
    tensors = {n: t.clone() for n, t in engine.program.tensors.items()}
    tensors[name].view(-1)[0] += 7
    engine.program = engine.program.with_(tensors=tensors)
    save(engine, tmp_path / "b.bw")
    found = check(tmp_path / "b.bw", program, tokens)
    assert not found.ok
    assert found.disagreements[0].where == "blocks.1"
    assert any("not what the passes make" in each.what for each in found.disagreements)


def test_a_lie_about_errors_is_found(
    artefact: Path, program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    certificate = json.loads(json.dumps(load(artefact, backend="eager").record["certificate"]))
    certificate["blocks"]["blocks.2"] /= 10
    certificate["outputs"]["output"]["difference"] /= 10
    certificate["costs"]["parameters"]["measured"] -= 1
    found = check(changed(artefact, tmp_path, certificate=certificate), program, tokens)
    assert [each.where for each in found.disagreements] == ["blocks.2", "output", "costs"]


@pytest.mark.parametrize(
    ("record", "where"), [({"certificate": None}, "certificate.json"),
                          ({"certificate": {"x": 1}}, "certificate.json"),
                          ({"recipe": "fuse-projections"}, "plan.json")]
)  # fmt: skip
def test_a_missing_part_is_a_disagreement(
    artefact: Path, program: Program, tokens: Tensor, tmp_path: Path, record: Any, where: str
) -> None:
    found = check(changed(artefact, tmp_path, **record), program, tokens)
    assert where in [each.where for each in found.disagreements]


def test_an_exact_recipe_that_is_not_exact_is_found(
    program: Program, tokens: Tensor, artefact: Path, tmp_path: Path
) -> None:
    steps = load(artefact, backend="eager").record["steps"][:1]
    path = changed(artefact, tmp_path, recipe="fuse-projections", steps=steps)
    found = check(path, program, tokens)
    assert any("the artefact promises exact results" in each.what for each in found.disagreements)


def test_passes_that_are_not_installed_are_noted(
    artefact: Path, program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    found = check(changed(artefact, tmp_path, recipe="prune-colours"), program, tokens)
    assert found.ok
    assert "the passes were not run again: there is no pass 'prune-colours'" in found.notes[0]


def test_another_model_disagrees(artefact: Path, tokens: Tensor, program: Program) -> None:
    torch.manual_seed(1)
    other = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)).eval()
    foreign = program.with_(
        tensors={n: other.state_dict().get(n, t) for n, t in program.tensors.items()}
    )
    found = check(artefact, foreign, tokens)
    assert found.disagreements[0].where == "blocks.0"
    fixed = capture(other, (tokens,))
    with pytest.raises(OptionError, match="called with other arguments"):
        check(artefact, fixed, tokens)
