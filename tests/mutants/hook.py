"""Change the source of one module while it is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Change:
    """A snippet of a file, and what stands there instead.

    Attributes:
        file: Path below the root of the repository.
        old: What is replaced; stands there exactly once.
        new: What replaces it.
    """

    file: str
    old: str
    new: str

    @property
    def module(self) -> str:
        """Name the file is imported by."""
        return ".".join(("blockwright", *Path(self.file).with_suffix("").parts))

    def apply(self) -> str:
        """Return the changed source.

        Raises:
            ValueError: The mutant is stale: the snippet is not there, or more than once.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"stale mutant: {self.file} has this {found} times: {self.old!r}")
        return text.replace(self.old, self.new)


class ChangedLoader(SourceFileLoader):
    """Loads a module from changed source, past any bytecode on disk."""

    def __init__(self, change: Change) -> None:
        super().__init__(change.module, str(ROOT / change.file))
        self.text = change.apply()
        self.used = False

    def get_code(self, fullname: str) -> CodeType:
        self.used = True
        return compile(self.text, self.path, "exec", dont_inherit=True)


class ChangedFinder(MetaPathFinder):
    """Finds one module before anybody else does."""

    def __init__(self, loader: ChangedLoader) -> None:
        self.loader = loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.loader.name:
            return None
        return spec_from_file_location(fullname, self.loader.path, loader=self.loader)


def install(change: Change) -> ChangedLoader:
    """Have a module imported in its changed form from now on.

    Raises:
        RuntimeError: It is imported already.
    """
    if change.module in sys.modules:
        raise RuntimeError(f"{change.module} is imported already")
    loader = ChangedLoader(change)
    sys.meta_path.insert(0, ChangedFinder(loader))
    return loader
