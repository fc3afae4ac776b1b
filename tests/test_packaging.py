"""The wheel holds the whole package and nothing else, and the root is imported once."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import blockwright

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGES = {"benchmarks", "build", "dist", "docs", "examples", "tests"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, so that nothing is left behind in it."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "."],
        cwd=source,
    )
    (built,) = folder.glob("blockwright-*.whl")
    return built


def test_wheel_holds_every_package(wheel: Path) -> None:
    missing = package_folders() - {Path(name).parent for name in names_in(wheel)}
    assert not missing, f"add these to `packages` in pyproject.toml: {sorted(map(str, missing))}"


def test_wheel_holds_every_module(wheel: Path) -> None:
    ours = {(Path("blockwright") / file.relative_to(ROOT)).as_posix() for file in package_files()}
    assert ours <= set(names_in(wheel))


def test_wheel_holds_nothing_but_the_package(wheel: Path) -> None:
    tops = {Path(name).parts[0] for name in names_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blockwright"}
    below = {Path(name).parts[1] for name in names_in(wheel) if name.startswith("blockwright/")}
    assert not below & NOT_PACKAGES


def test_wheel_is_marked_as_typed(wheel: Path) -> None:
    assert "blockwright/py.typed" in names_in(wheel)


def test_import_needs_the_wheel_and_no_extra(wheel: Path, tmp_path: Path) -> None:
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(unpacked)
    empty.mkdir()
    hidden = {name.replace("-", "_"): None for name in declared_in_extras() - declared()}
    program = (
        f"import sys; sys.modules.update({hidden}); import blockwright as b; print(b.__file__)"
    )
    where = run(
        [sys.executable, "-c", program],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
    )
    # PYTHONPATH stands before the finder of an editable install, so this is not the checkout.
    assert Path(where.strip()) == unpacked / "blockwright" / "__init__.py"


def test_what_the_package_imports_is_declared() -> None:
    known = declared() | declared_in_extras()
    distributions = packages_distributions()
    for file in package_files():
        for module in imported_modules(file):
            if module in sys.stdlib_module_names or module == "blockwright":
                continue
            names = {normalized(name) for name in distributions.get(module, [module])}
            place = file.relative_to(ROOT)
            assert names & known, f"{place} imports {module}; declare it in pyproject.toml"


def test_root_is_imported_once_and_as_blockwright() -> None:
    assert blockwright.__file__ is not None
    front_door = ROOT / "__init__.py"
    assert Path(blockwright.__file__).resolve() == front_door
    names = [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) == str(front_door)
    ]
    assert names == ["blockwright"]
    assert ROOT.name == "blockwright" or ROOT.name not in sys.modules


def test_test_folders_are_not_packages() -> None:
    # With an __init__.py in it, a test folder would be a part of the root package to pytest.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def package_folders() -> set[Path]:
    """Folders with an `__init__.py`, as paths inside the wheel."""
    found = {Path("blockwright")}
    for top in ROOT.iterdir():
        if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_PACKAGES:
            found |= {
                Path("blockwright") / init.parent.relative_to(ROOT)
                for init in top.rglob("__init__.py")
            }
    return found


def package_files() -> list[Path]:
    return [
        file
        for folder in sorted(package_folders())
        for file in sorted((ROOT / folder.relative_to("blockwright")).glob("*.py"))
    ]


def imported_modules(file: Path) -> Iterator[str]:
    """The first part of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def declared() -> set[str]:
    return {requirement_name(text) for text in project()["dependencies"]}


def declared_in_extras() -> set[str]:
    extras = project()["optional-dependencies"]
    return {requirement_name(text) for extra in extras if extra != "dev" for text in extras[extra]}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirement_name(requirement: str) -> str:
    return normalized(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def run(command: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
