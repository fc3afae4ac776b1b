"""Walk the register: names agree, sources are given, options are documented and typed."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import blockwright
from blockwright.passes import PASSES, Pass, Promise

ROOT = Path(blockwright.__file__).parent
TEXT_FILES = (".py", ".md", ".toml", ".txt", ".yaml", ".j2", "")


def snake(name: str) -> str:
    name = name.replace("MoE", "Moe")  # one word
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def test_the_register_is_in_alphabetical_order() -> None:
    names = [pass_.__name__ for pass_ in PASSES]
    assert names == sorted(names)


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_one_method_one_file_one_name(pass_: type[Pass[Any, Any]]) -> None:
    stem = snake(pass_.__name__)
    assert pass_.name == stem.replace("_", "-")
    assert pass_.__module__ == f"blockwright.passes.{stem}"
    assert (ROOT / "tests" / "passes" / f"test_{stem}.py").is_file()
    assert (ROOT / "tests" / "passes" / "golden" / f"{stem}.txt").is_file()
    assert getattr(blockwright, pass_.__name__) is pass_


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_docstrings_say_source_options_and_exact_case(pass_: type[Pass[Any, Any]]) -> None:
    text = inspect.getdoc(pass_) or ""
    assert "Source:" in text
    assert "Exact when:" in text
    assert isinstance(pass_.promise, Promise)
    own = [f.name for f in dataclasses.fields(pass_) if f.name not in Pass.__dataclass_fields__]
    for option in own:
        assert re.search(rf"^    {option}: ", text, re.M), f"{option} is not documented"
    assert dataclasses.fields(pass_)
    assert pass_.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_the_readme_lists_every_pass(pass_: type[Pass[Any, Any]]) -> None:
    assert f"`{pass_.__name__}`" in (ROOT / "README.md").read_text()


def test_imports_inside_the_package_are_relative() -> None:
    folders = ("ir", "passes", "kernels", "backends", "models", "driver")
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "blockwright" for name in names), path


def test_nothing_unpickles() -> None:
    banned = re.compile(r"^\s*(import pickle|from pickle)|torch\.load\(|weights_only=False", re.M)
    for folder in ("ir", "passes", "kernels", "backends", "models", "driver"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not banned.search(path.read_text()), path
