"""Pages of passes are made from the passes; `make docs` makes them again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import blockwright as bw
from blockwright.driver.pass_page import pass_page
from blockwright.passes import PASSES, Pass

ROOT = Path(bw.__file__).parent
PAGES = ROOT / "docs" / "passes"


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_page_is_what_the_pass_says(kind: type[Pass[Any, Any]]) -> None:
    golden = ROOT / "tests" / "passes" / "golden" / f"{kind.name.replace('-', '_')}.txt"
    text, path = pass_page(kind, golden.read_text()), PAGES / f"{kind.name}.md"
    if os.environ.get("BLOCKWRIGHT_GOLDEN") == "rewrite":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} is stale; run `make docs`"


def test_every_page_has_its_pass() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {kind.name for kind in PASSES}
