"""`blockwright new-pass`: pass, test and page to start from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import OptionError
from .cli_options import Debug, Json
from .cli_view import screen, show, show_json
from .new_pass import REGIONS, NewPass, lay_out_inside, lay_out_package

NEXT_INSIDE = """\
Next:
  write decide and replace, name the paper, and add a row to the table of methods in README.md
  make golden docs    # the golden graph and the page of the pass; read their diff
  make test"""
NEXT_PACKAGE = """\
Next:
  write decide and replace, and name the paper
  pip install -e '{folder}[test]' && blockwright passes {name}
  pytest {folder}"""


def new_pass_command(
    name: Annotated[str, typer.Argument(help="Its name, as in recipes: prune-ffn.")],
    region: Annotated[
        str, typer.Option(metavar="|".join(REGIONS), help="What it looks at.")
    ] = "linear",
    package: Annotated[
        Path | None, typer.Option(help="Lay out a package of its own in this folder.")
    ] = None,
    checkout: Annotated[
        Path, typer.Option(help="The checkout of blockwright it is added to, without --package.")
    ] = Path(),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Lay out a pass that runs, with its tests, for its author to fill in.

    In a checkout it is registered, and its golden graph and page are written.
    """
    with screen(as_json, debug):
        new = NewPass(name, region)
        if package is None:
            files = lay_out_inside(new, checkout)
            files += _golden(new, checkout)
            following = NEXT_INSIDE
        else:
            files = lay_out_package(new, package)
            following = NEXT_PACKAGE.format(folder=package, name=name)
    if as_json:
        show_json({"name": name, "files": [str(file) for file in files]})
    else:
        show(*(f"wrote {file}" for file in files), "", following)


def _golden(new: NewPass, checkout: Path) -> list[Path]:
    """Let the new test write its golden graph, and from it the page of the pass.

    Raises:
        OptionError: The tests cannot run.
    """
    tests = checkout / "tests"
    found = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", f"passes/test_{new.stem}.py::test_golden",
         f"test_pages.py::test_page_is_what_the_pass_says[{new.name}]"],
        cwd=tests,
        env={**os.environ, "BLOCKWRIGHT_GOLDEN": "rewrite"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if found.returncode:
        raise OptionError(
            f"{new.name} is laid out, but its golden graph could not be made:"
            f" {(found.stdout or found.stderr).strip()[-300:]}",
            where=str(checkout),
            remedy="run `make golden docs` and see what fails.",
        )
    stem = new.stem
    return [tests / "passes" / "golden" / f"{stem}.txt", checkout / f"docs/passes/{new.name}.md"]
