"""A pass of another package: listed, usable by name, and it passes the suite.

It is made importable as an installed one is: its source, and the entry points that its
`pyproject.toml` declares, are put on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import blockwright as bw
from blockwright.driver.cli import app
from blockwright.driver.manager import run_passes
from blockwright.driver.recipe import parse_text, parse_toml
from blockwright.driver.register import find_pass
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT

FOLDER = Path(bw.__file__).parent / "examples" / "third_party" / "blockwright-fold-norms"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package, as far as Python can tell."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "blockwright_fold_norms-0.1.0.dist-info"
    metadata.mkdir()
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(header)
    points = project["entry-points"]["blockwright.passes"]
    lines = [f"{name} = {place}" for name, place in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[blockwright.passes]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(FOLDER / "src")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_passes_lists_it() -> None:
    listed = CliRunner().invoke(app, ["passes", "--json"])
    assert listed.exit_code == 0, listed.output
    assert {"fold-norms", "fuse-projections"} <= {
        each["name"] for each in json.loads(listed.stdout)
    }
    (shown,) = (p for p in json.loads(listed.stdout) if p["name"] == "fold-norms")
    assert "2401.15024" in shown["notes"]["Source"]
    assert [option["name"] for option in shown["options"]][:2] == ["include", "exclude"]


def test_recipes_name_it() -> None:
    (step,) = parse_text('fold-norms{exclude=["head"]}')
    assert (step,) == tuple(parse_toml('[[pass]]\nname = "fold-norms"\nexclude = ["head"]'))
    assert isinstance(step, find_pass("fold-norms"))


def test_an_engine_is_compiled_with_it(gpt: GPT, tokens: Tensor) -> None:
    recipe = "fold-norms{allow_no_match=true}, fuse-projections"
    engine = bw.compile(gpt, passes=recipe, example_inputs=(tokens,), backend="eager")
    torch.testing.assert_close(engine(tokens), gpt(tokens), rtol=1e-4, atol=1e-5)
    assert all(norm.weight is None for norm in engine.program.norms()[:-1])


def test_it_folds_and_says_what_it_leaves(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, parse_text("fold-norms"), [[tokens]])
    assert len(step.receipt.changed) == 6
    assert step.receipt.skipped == {"norm": "is read by head, whose weight is shared"}
    assert [norm.weight is None for norm in new.norms()] == [True] * 6 + [False]
    lost = program.cost().parameters - new.cost().parameters
    assert lost == 6 * 2 * 8  # gain and shift of six norms of width 8


@pytest.mark.slow
def test_its_own_tests_pass(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(FOLDER / "tests")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
