"""The snippets of the guides run as they stand, top to bottom, as one module."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import blockwright as bw

ROOT = Path(bw.__file__).parent
GUIDES = ("add-a-pass",)


@pytest.fixture(scope="module", params=GUIDES)
def guide(request: pytest.FixtureRequest) -> ModuleType:
    """The Python of a guide, as a module that has run."""
    path = ROOT / "docs" / f"{request.param}.md"
    module = ModuleType(path.stem.replace("-", "_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        patch.chdir(request.getfixturevalue("tmp_path_factory").mktemp("guide"))
        exec(compile(python_of(path.read_text()), str(path), "exec"), vars(module))
    return module


def python_of(text: str) -> str:
    """Return the Python of a page, every line where it stands in the page."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            kept.append("")
        else:
            kept.append(line if inside else "")
    return "\n".join(kept)


def test_guide_passes_its_own_tests(guide: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, guide.__name__, guide)
    tests = [value for name, value in vars(guide).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.slow
def test_guide_passes_the_suite(guide: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, guide.__name__, guide)
    suites = [value for name, value in vars(guide).items() if name.startswith("Test")]
    assert suites
    for suite in suites:
        for name, test in inspect.getmembers(suite, inspect.isfunction):
            if name.startswith("test_"):
                test(suite())


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / "docs" / f"{name}.md"
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target
