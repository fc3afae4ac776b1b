"""Known bugs are noticed: a twentieth of them by `make test`, all of them by `make mutants`.

`BLOCKWRIGHT_MUTANTS` is a shard such as `1/3`, `all` or `none`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def mutants() -> list[dict[str, Any]]:
    return tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))["mutant"]


def shard() -> str:
    asked = os.environ.get("BLOCKWRIGHT_MUTANTS", "")
    return {"": "1/20", "all": "1/1"}.get(asked, asked)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(shard() == "none", reason="BLOCKWRIGHT_MUTANTS=none")
def test_known_bugs_are_noticed() -> None:
    # The tests run elsewhere in this suite: no need to see them pass without a mutant.
    command = [sys.executable, str(HERE / "run.py"), "--no-baseline", "--jobs", "1"]
    found = subprocess.run([*command, "--shard", shard()], capture_output=True, text=True)
    print(found.stdout)  # noqa: T201
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_mutant_is_stale() -> None:
    for mutant in mutants():
        text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
        count = text.count(mutant["old"])
        assert count == 1, f"{mutant['name']}: {mutant['file']} has its snippet {count} times"
        compile(text.replace(mutant["old"], mutant["new"]), mutant["file"], "exec")


def test_names_are_told_apart() -> None:
    names = [mutant["name"] for mutant in mutants()]
    assert len(set(names)) == len(names) >= 60


def test_the_page_lists_every_mutant() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9-]+) \| `", page, flags=re.MULTILINE)
    assert rows == [mutant["name"] for mutant in mutants()], "run `make mutants`"


def test_the_changed_source_is_what_is_imported() -> None:
    spec = spec_from_file_location("hook", HERE / "hook.py")
    assert spec is not None
    hook = module_from_spec(spec)
    sys.modules[spec.name] = hook  # dataclasses look their module up
    spec.loader.exec_module(hook)  # type: ignore[union-attr]
    change = hook.Change("ir/errors.py", "class CaptureError(", "class Renamed(")
    loader = hook.ChangedLoader(change)
    found = hook.ChangedFinder(loader).find_spec("blockwright.ir.errors", None)
    module = module_from_spec(found)
    loader.exec_module(module)
    assert hasattr(module, "Renamed")
    assert not hasattr(module, "CaptureError")
    assert hook.ChangedFinder(loader).find_spec("blockwright.ir", None) is None
    with pytest.raises(ValueError, match="stale mutant"):
        hook.Change("ir/errors.py", "class NotThere", "").apply()
