"""The command line on presets: published models by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from blockwright.driver import cli
from blockwright.driver.zoo import PRESETS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def data(*args: str) -> Any:
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_models_lists_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.PRESETS is PRESETS
    chosen = [preset for preset in PRESETS if preset.name in ("flux.1-dev", "wan2.1-14b")]
    monkeypatch.setattr(cli, "PRESETS", chosen)
    found = {row["name"]: row for row in data("models")}
    assert list(found) == ["flux.1-dev", "wan2.1-14b"]
    assert found["wan2.1-14b"]["parameters"] == 14_288_491_584
    text = call("models").stdout
    assert "11,901,408,320" in text
    assert "batch=1, rows=64, columns=64, words=512" in text


def test_inspect_takes_a_name_in_any_case() -> None:
    found = data("inspect", "Wan2.1-1.3B")
    assert found["cost"]["parameters"] == 1_418_996_800
    assert found["inputs"]["x"]["shape"] == [1, 16, 21, 60, 104]
    sizes = "batch=1, frames=21, height=60, width=104, words=512"
    assert found["notes"] == [f"wan2.1-1.3b: shapes only, no weights; example inputs at {sizes}."]
    assert [len(block["instances"]) for block in found["blocks"].values()] == [30]
    shares = {share["owner"]: share for share in found["explanation"]["shares"]}
    assert shares["attention"]["regions"] == 60
    assert sum(share["flops"] for share in shares.values()) == found["cost"]["flops"]


def test_inspect_says_what_it_counted() -> None:
    text = call("inspect", "vit-ti/16").stdout
    assert "one multiply-add is two FLOPs" in text
    assert "note: vit-ti/16: shapes only, no weights; example inputs at batch=1." in text
    assert "Recognised" in text


def test_inputs_and_sizes_can_be_others_than_the_published() -> None:
    found = data("inspect", "gpt2", "--dynamic", "tokens:1=seq", "--cost", "seq=8")
    assert found["sizes"] == {"seq": 8}
    given = data("inspect", "gpt2", "--input", "tokens=int64[1,8]")
    assert given["cost"]["flops"] == found["cost"]["flops"]
    assert given["notes"] == ["gpt2: shapes only, no weights."]


def test_compile_draws_weights_and_says_so() -> None:
    found = data("compile", "vit-ti/16", "-o", "vit.bw", "--backend", "eager", "--seed", "3")
    note = "vit-ti/16: random weights, seed 3; example inputs at batch=1."
    assert found["record"]["notes"] == [note]
    assert data("run", "vit.bw", "--random")["outputs"]["output"]["nonfinite"] == 0


def test_bench_draws_weights_and_says_so() -> None:
    text = call("bench", "vit-ti/16", "--backend", "eager", "--rounds", "1").stdout
    assert "note: vit-ti/16: random weights, seed 0; example inputs at batch=1." in text


def test_presets_without_room_for_weights_are_refused() -> None:
    for command in (("compile", "flux.1-dev", "-o", "x.bw"), ("bench", "flux.1-dev")):
        result = call(*command)
        assert result.exit_code == 2
        assert "flux.1-dev has 11.9 G parameters; random weights are drawn for 1.0 G at most." in (
            result.stderr
        )


def test_unknown_names_bring_near_ones_or_all() -> None:
    assert "Try: did you mean flux.1-dev" in call("inspect", "flux.1-dve").stderr
    stderr = call("inspect", "nothing at all").stderr
    assert "or a preset: gpt2, gpt2-medium," in stderr
    assert stderr.rstrip().endswith(f"{PRESETS[-1].name}.")


def test_a_folder_of_that_name_comes_first(folder: Path) -> None:
    (folder / "gpt2").mkdir()
    assert "gpt2 is not a Hugging Face model directory." in call("inspect", "gpt2").stderr
