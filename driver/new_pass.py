"""Lay out a new pass: in the checkout of blockwright, or as a package of its own.

What is laid out runs: the pass puts the same computation back where it was, and its tests pass. The
author then replaces `decide` and `replace`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..ir.errors import OptionError
from .doctor import version
from .new_pass_register import with_import, with_name, with_pass
from .register import pass_names
from .templating import render

REGIONS: Final = {
    "feed_forward": "FeedForward",
    "attention": "Attention",
    "block": "Block",
    "linear": "Linear",
    "norm": "Norm",
    "embedding": "Embedding",
}
"""Kinds of region a pass can start from, and their classes in `ir.recognize`."""


@dataclass(frozen=True)
class NewPass:
    """Every name a new pass goes by.

    Attributes:
        name: As in recipes: `prune-ffn`.
        region: A key of `REGIONS`.

    Raises:
        OptionError: The name is malformed or taken, or there is no such region.
    """

    name: str
    region: str = "linear"

    def __post_init__(self) -> None:
        words = self.name.split("-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", self.name) or keyword.iskeyword(
            self.name
        ):
            raise OptionError(
                f"{self.name!r} cannot name a pass.",
                remedy="use lower-case words joined by hyphens, as in prune-ffn.",
            )
        if self.name in pass_names():
            raise OptionError(f"there is a pass {self.name!r} already.", remedy="use another name.")
        if self.class_name in ("Pass", "Skip", "Promise", "RegionModule", *REGIONS.values()):
            raise OptionError(
                f"{self.name!r} cannot name a pass: its class would hide {self.class_name}.",
                remedy=f"say what it does to it, as in {words[0]}-blocks.",
            )
        if self.region not in REGIONS:
            raise OptionError(
                f"there is no region {self.region!r} to start from.",
                remedy=f"use one of {', '.join(REGIONS)}.",
            )

    @property
    def stem(self) -> str:
        """Name of its file: `prune_ffn`."""
        return self.name.replace("-", "_")

    @property
    def class_name(self) -> str:
        """Name of its class: `PruneFfn`."""
        return "".join(word.capitalize() for word in self.name.split("-"))

    @property
    def package(self) -> str:
        """Name of its package, if it has one: `blockwright_prune_ffn`."""
        return f"blockwright_{self.stem}"

    def render(self, template: str, *, inside: bool) -> str:
        """Return a file of the layout.

        Args:
            template: File name in `driver/templates`, without `.j2`.
            inside: Whether the pass is a part of blockwright.
        """
        return render(
            template,
            new=self,
            region_class=REGIONS[self.region],
            inside=inside,
            version=version(),
        )


def lay_out_inside(new: NewPass, root: Path) -> list[Path]:
    """Write pass and test into a checkout, and register the pass.

    Args:
        new: The pass.
        root: Root of the checkout.

    Returns:
        The files written.

    Raises:
        OptionError: A file is there already, or `root` is no checkout.
    """
    register, door = root / "passes" / "__init__.py", root / "__init__.py"
    if not (register.is_file() and door.is_file() and (root / "tests" / "passes").is_dir()):
        raise OptionError(
            f"{root} is no checkout of blockwright, so a pass cannot be added to it.",
            remedy="lay out a package of your own: --package FOLDER.",
        )
    module = f".{new.stem}"
    written = _write(
        {
            root / "passes" / f"{new.stem}.py": new.render("pass.py", inside=True),
            root / "tests" / "passes" / f"test_{new.stem}.py": new.render("test.py", inside=True),
        }
    )
    text = with_import(register.read_text("utf-8"), module, new.class_name)
    register.write_text(with_name(with_pass(text, new.class_name), new.class_name), "utf-8")
    text = with_import(door.read_text("utf-8"), ".passes", new.class_name)
    door.write_text(with_name(text, new.class_name), "utf-8")
    return [*written, register, door]


def lay_out_package(new: NewPass, folder: Path) -> list[Path]:
    """Write an installable package that brings one pass.

    Args:
        new: The pass.
        folder: Where it goes; may hold other files.

    Returns:
        The files written.

    Raises:
        OptionError: A file is there already.
    """
    source = folder / "src" / new.package
    return _write(
        {
            folder / "pyproject.toml": new.render("pyproject.toml", inside=False),
            folder / "README.md": new.render("README.md", inside=False),
            source / "__init__.py": new.render("package.py", inside=False),
            source / f"{new.stem}.py": new.render("pass.py", inside=False),
            source / "py.typed": "",
            folder / "tests" / f"test_{new.stem}.py": new.render("test.py", inside=False),
        }
    )


def _write(files: Mapping[Path, str]) -> list[Path]:
    """Write all files, or none if one is there."""
    there = [path for path in files if path.exists()]
    if there:
        raise OptionError(
            f"{there[0]} is there already.", remedy="use another name, or move it away."
        )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return list(files)
