"""A thin layer on top: a captured model, a backend, an artefact on disk; and the fuzz command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import blockwright
from blockwright.passes import Canonicalize, FuseProjections, QuantizeWeights
from blockwright.testing import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    InputSpec,
    ModelConfig,
    WeightSpec,
)
from blockwright.testing.agreement import captured
from blockwright.testing.case import eager_runs, outputs
from blockwright.testing.conformance import PROPERTIES
from blockwright.testing.fuzz import fuzz, main
from blockwright.testing.tolerance import t1
from blockwright.testing.values import inputs_of

DECODER = ModelConfig(
    family="decoder",
    dim=4,
    vocab=7,
    blocks=(
        BlockConfig(
            attention=AttentionConfig(2, 2, 4, "spelled", "additive", "half", 2),
            ffn=FeedForwardConfig(5, "silu", gated=True),
            norm="rms",
            spelled=True,
        ),
    )
    * 2,
    head="linear",
    dynamic=("batch", "seq"),
    weights=WeightSpec(kind="gauss"),
)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("eager", marks=pytest.mark.slow)])
def test_backends_agree_with_fp64_after_exact_passes(backend: str, tmp_path: Path) -> None:
    program = captured(DECODER)
    given = inputs_of(DECODER, InputSpec(kind="gauss"), batch=3, seq=5)
    flat = list(given.values())
    engine = blockwright.compile(
        program, [Canonicalize(), FuseProjections()], given, backend=backend
    )
    truth = outputs(program, flat, torch.float64)
    t1([engine(**given)], eager_runs(program, flat), truth)
    engine.save(tmp_path / "a")
    blockwright.load(tmp_path / "a").save(tmp_path / "b")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    again = {p.name: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert files == again


def test_fuzz_saves_what_breaks_and_prints_seeds(tmp_path: Path) -> None:
    def broken(case: Any) -> None:
        assert case.config.dim < 3, "too wide"

    broken.__name__ = "is_narrow"
    property_ = type(PROPERTIES[0])(broken, PROPERTIES[0].domain)
    lines: list[str] = []
    tally = fuzz(1e-6, tmp_path, seed=1, say=lines.append, properties=[property_])
    (path,) = tally.saved
    data = json.loads(path.read_text())
    assert data["property"] == "is_narrow"
    assert data["config"]["dim"] == 4  # the simplest that breaks it, in the order they are drawn
    assert data["config"].keys() <= {"family", "dim", "batch", "seq"}
    assert "is_narrow" in str(tally)
    assert lines[0].split()[0].isdigit()


def test_the_fuzz_command_says_that_nothing_broke(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--minutes", "1e-9", "--corpus", str(tmp_path)]) == 0
    assert "0 failures" in capsys.readouterr().out


@pytest.mark.slow
def test_quantized_weights_survive_the_disk(tmp_path: Path) -> None:
    given = inputs_of(DECODER, InputSpec(kind="gauss"))
    engine = blockwright.compile(
        captured(DECODER), [QuantizeWeights(bits=4, group_size=3)], given, backend="eager"
    )
    engine.save(tmp_path / "q")
    assert torch.equal(blockwright.load(tmp_path / "q")(**given), engine(**given))
