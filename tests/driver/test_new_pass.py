"""`blockwright new-pass`: what it lays out is registered, formatted, documented, and runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import blockwright as bw
from blockwright.driver.cli import app
from blockwright.driver.new_pass import REGIONS, NewPass, lay_out_inside, lay_out_package
from blockwright.driver.new_pass_register import with_import, with_name, with_pass
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.region_module import RegionModule
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.testing import AttentionConfig, BlockConfig, ModelConfig, to_program

ROOT = Path(bw.__file__).parent


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["new-pass", *args])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of a checkout that a new pass touches."""
    for name in ("__init__.py", "passes/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "passes").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name", ["Prune", "prune_ffn", "-x", "x-", "2x", "", "a--b", "class"])
def test_refuses_bad_names(name: str) -> None:
    with pytest.raises(OptionError, match="cannot name a pass"):
        NewPass(name)


def test_refuses_names_that_hide_another() -> None:
    with pytest.raises(OptionError, match="would hide Block"):
        NewPass("block")


def test_refuses_names_of_passes() -> None:
    found = call("quantize-weights")
    assert found.exit_code == 2
    assert found.stderr.strip() == (
        "OptionError: there is a pass 'quantize-weights' already. Try: use another name."
    )


def test_refuses_unknown_regions() -> None:
    found = call("scale-heads", "--region", "head", "--json")
    assert found.exit_code == 2
    error = json.loads(found.stdout)["error"]
    assert error["what"] == "there is no region 'head' to start from."
    assert "feed_forward" in error["remedy"]


def test_refuses_what_is_no_checkout(tmp_path: Path) -> None:
    found = call("scale-heads", "--checkout", str(tmp_path))
    assert found.exit_code == 2
    assert "is no checkout" in found.stderr
    assert not list(tmp_path.iterdir())


def test_overwrites_nothing(checkout: Path) -> None:
    there = checkout / "tests" / "passes" / "test_scale_heads.py"
    there.write_text("mine")
    before = (checkout / "passes" / "__init__.py").read_text()
    with pytest.raises(OptionError, match=r"test_scale_heads\.py is there already"):
        lay_out_inside(NewPass("scale-heads"), checkout)
    assert there.read_text() == "mine"
    assert not (checkout / "passes" / "scale_heads.py").exists()
    assert (checkout / "passes" / "__init__.py").read_text() == before


@pytest.mark.parametrize("name", ["a-first", "merge-heads", "zero-tails"])
def test_registers_in_order(checkout: Path, name: str) -> None:
    new = NewPass(name)
    lay_out_inside(new, checkout)
    register = ast.parse((checkout / "passes" / "__init__.py").read_text())
    (passes,) = (n.value for n in register.body if isinstance(n, ast.AnnAssign))
    assert isinstance(passes, ast.Tuple)
    listed = [ast.unparse(item) for item in passes.elts]
    assert listed == sorted(listed)
    assert new.class_name in listed
    assert f"from .{new.stem} import {new.class_name}" in map(ast.unparse, register.body)
    door = ast.parse((checkout / "__init__.py").read_text())
    assert any(
        isinstance(n, ast.ImportFrom) and new.class_name in [alias.name for alias in n.names]
        for n in door.body
    )


def test_register_reads_as_before_apart_from_the_pass() -> None:
    text = (
        "from .base import Pass\nfrom .drop import Drop\n\n"
        "PASSES: tuple[type, ...] = (Drop,)  # why\n"
        '\n__all__ = [\n    "MAIN",\n    "Drop",\n    "find",\n]\n'
    )
    new = with_name(with_pass(with_import(text, ".carve", "Carve"), "Carve"), "Carve")
    assert new == (
        "from .base import Pass\nfrom .carve import Carve\nfrom .drop import Drop\n\n"
        "PASSES: tuple[type, ...] = (  # why\n    Carve,\n    Drop,\n)\n"
        '\n__all__ = [\n    "MAIN",\n    "Carve",\n    "Drop",\n    "find",\n]\n'
    )


@pytest.mark.parametrize("region", REGIONS)
def test_layout_is_formatted_and_clean(checkout: Path, tmp_path: Path, region: str) -> None:
    lay_out_inside(NewPass("scale-heads", region), checkout)
    lay_out_package(NewPass("scale-heads", region), tmp_path / "package")
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ruff", *command, *config, "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_package_names_its_entry_point(tmp_path: Path) -> None:
    found = call("scale-heads", "--package", str(tmp_path), "--region", "attention")
    assert found.exit_code == 0, found.output
    assert f"wrote {tmp_path / 'pyproject.toml'}" in found.stdout.replace("\n", "")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["blockwright.passes"]
    assert points == {"scale-heads": "blockwright_scale_heads:ScaleHeads"}


@pytest.mark.parametrize("kind", ["feed_forwards", "attentions", "blocks", "norms", "embeddings"])
def test_a_region_as_a_module_computes_the_same(program: Program, tokens: Any, kind: str) -> None:
    for region in getattr(program, kind)():
        new = program.replace(region, RegionModule(region))
        (found,), (expected,) = run(new, [tokens]), run(program, [tokens])
        assert (found == expected).all()
        assert new.tensors.keys() == program.tensors.keys()


def test_an_attention_in_several_ops_as_a_module_computes_the_same() -> None:
    """Its keys are turned by a node that nothing else places before or after the region."""
    block = BlockConfig(attention=AttentionConfig(form="spelled"))
    program = to_program(ModelConfig(blocks=(block,)))
    (attention,) = program.attentions()
    new = program.replace(attention, RegionModule(attention))
    verify(new)
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(new, [x])[0], run(program, [x])[0])


@pytest.mark.slow
@pytest.mark.parametrize("region", REGIONS)
def test_tests_of_a_package_pass(tmp_path: Path, region: str) -> None:
    lay_out_package(NewPass("scale-heads", region), tmp_path)
    run_tests(tmp_path, [])


@pytest.mark.slow
def test_a_pass_inside_is_golden_documented_and_passes(tmp_path: Path) -> None:
    copy = tmp_path / "blockwright"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=left_out)
    # PYTHONPATH stands before the finder of an editable install, so the copy is what is imported.
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = "from blockwright.driver.cli import main; main()"
    command = [sys.executable, "-P", "-c", script, "new-pass", "scale-ffn", "--region",
               "feed_forward", "--checkout", str(copy)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    golden = (copy / "tests" / "passes" / "golden" / "scale_ffn.txt").read_text()
    assert golden.startswith("# scale-ffn: 3 rewrites, 0 skips")
    assert "# scale-ffn" in (copy / "docs" / "passes" / "scale-ffn.md").read_text()
    run_tests(
        copy / "tests",
        ["passes/test_scale_ffn.py", "test_pages.py::test_page_is_what_the_pass_says[scale-ffn]"],
        env,
    )
    names = "one_name and scale-ffn or docstrings_say and scale-ffn or alphabetical"
    run_tests(copy / "tests", ["test_conventions.py", "-k", names], env)


def run_tests(folder: Path, args: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env=env or {**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
