"""`docs/bad-inputs.md` counts to 110, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import blockwright

ROOT = Path(blockwright.__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \| (.+?) \| (E|W|OK|-) \| (.+) \|$",
    (ROOT / "docs" / "bad-inputs.md").read_text(),
    re.M,
)


def test_every_entry_is_there_once() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 111))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_it_has_a_test_or_a_reason(row: tuple[str, str, str, str]) -> None:
    _, _, outcome, what = row
    if outcome == "-":
        assert "::" not in what
        return
    path, _, name = what.strip("`").partition("::")
    assert name in functions(ROOT / "tests" / path)


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
