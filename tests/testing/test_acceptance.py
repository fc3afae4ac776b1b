"""Rows of the acceptance page: written once, kept while their test is there, shown in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blockwright.testing import acceptance as module
from blockwright.testing.acceptance import DATA, PAGE, Acceptance, publish, read, render

ROOT = Path(__file__).resolve().parent.parent.parent
Record = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one test file in it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_one():\n    def test_two(x): ...\n")
    return tmp_path


@pytest.fixture
def record(root: Path) -> Record:
    def run(test: str, *rows: dict[str, Any]) -> None:
        recorder = Acceptance(f"tests/test_a.py::{test}")
        for row in rows:
            recorder(**{
                "method": "lego", "number": 1, "comparison": "A | B.", "naive": "none",
                "figure": "1 against 2", "holds": True, **row,
            })  # fmt: skip
        publish(root, recorder.test, recorder.rows)

    return run


def pages(root: Path) -> tuple[str, str]:
    return (root / "docs" / DATA).read_text(), (root / "docs" / PAGE).read_text()


def test_rows_are_grouped_and_sorted_and_tell_what_does_not_hold(
    root: Path, record: Record
) -> None:
    record("test_one", {"method": "widenet"}, {"number": 10}, {"number": 2, "holds": False})
    _, page = pages(root)
    assert page.index("## lego") < page.index("## widenet")
    assert page.index("| 2 | A \\| B. | none | 1 against 2 | **does not hold** |") < page.index(
        "| 10 | A \\| B. | none | 1 against 2 | holds |"
    )
    assert "| [lego](#lego) | 1 | 1 |\n| [widenet](#widenet) | 1 | 0 |\n| all | 2 | 1 |" in page
    assert page == render(read(root / "docs" / DATA))


def test_a_test_replaces_its_own_rows_and_keeps_those_of_others(root: Path, record: Record) -> None:
    record("test_one[a]", {"figure": "old"}, {"number": 2})
    record("test_two", {"number": 3})
    record("test_one[a]", {"figure": "new"})
    assert [(row.number, row.figure) for row in read(root / "docs" / DATA)] == [
        (1, "new"),
        (3, "1 against 2"),
    ]


def test_rows_of_tests_that_are_gone_are_dropped(root: Path, record: Record) -> None:
    record("test_one", {})
    record("test_gone", {"number": 2})
    assert len(read(root / "docs" / DATA)) == 2
    record("test_two", {"number": 3})
    assert [row.number for row in read(root / "docs" / DATA)] == [1, 3]


def test_repeating_a_run_changes_nothing(
    root: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record("test_one", {}, {"number": 2})
    before = pages(root)
    monkeypatch.setattr(module, "here_and_now", lambda: "tomorrow, elsewhere")
    record("test_one", {}, {"number": 2})
    assert pages(root) == before
    record("test_one", {}, {"number": 2, "figure": "3"})
    assert [row.measured == "tomorrow, elsewhere" for row in read(root / "docs" / DATA)] == [
        False,
        True,
    ]


def test_tests_that_end_together_all_count(root: Path, record: Record) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: record(f"test_one[{n}]", {"number": n}), range(1, 17)))
    assert [row.number for row in read(root / "docs" / DATA)] == list(range(1, 17))


def test_the_fixture_knows_the_test(acceptance: Acceptance) -> None:
    assert acceptance.test.endswith("test_acceptance.py::test_the_fixture_knows_the_test")
    assert acceptance.rows == []


def test_the_page_shows_what_is_stored() -> None:
    rows = read(ROOT / "docs" / DATA)
    assert (ROOT / "docs" / PAGE).read_text() == render(rows), "run `make acceptance`"
    assert all(module.exists(ROOT, row.test) for row in rows), "run `make acceptance`"
