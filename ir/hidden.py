"""Blocks that must not change, and do not show what is inside, while others are exported."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from torch import nn

from .contents import contents


class Unfit(Exception):
    """The model cannot be captured block by block."""


class _Hidden(dict[str, Any]):
    """An empty table that remembers which names it hides, and tells whoever asks for one.

    While the model runs, it also tells whoever walks it: what the model counts or sums is missing.
    """

    def __init__(self, held: dict[str, Any], running: Callable[[], bool]) -> None:
        super().__init__()
        self.held, self.running = held, running

    def __contains__(self, name: object) -> bool:
        if name in self.held:
            raise Unfit(f"something reads {name} of a block from outside")
        return False

    def __len__(self) -> int:
        self._refuse()
        return 0

    def __iter__(self) -> Iterator[str]:
        self._refuse()
        return iter(())

    def keys(self) -> Any:
        self._refuse()
        return super().keys()

    def values(self) -> Any:
        self._refuse()
        return super().values()

    def items(self) -> Any:
        self._refuse()
        return super().items()

    def _refuse(self) -> None:
        if self.held and self.running():
            raise Unfit("the model looks through its blocks while it runs")


@contextlib.contextmanager
def hidden(blocks: Sequence[nn.Module], running: Callable[[], bool]) -> Iterator[None]:
    """Hide what is inside blocks from whoever walks the model before `running`."""
    kept = [{name: block.__dict__[name] for name in _TABLES} for block in blocks]
    try:
        for block, tables in zip(blocks, kept, strict=True):
            block.__dict__.update({name: _Hidden(held, running) for name, held in tables.items()})
        yield
    finally:
        for block, tables in zip(blocks, kept, strict=True):
            block.__dict__.update(tables)


_TABLES = ("_parameters", "_buffers", "_modules")


class Frozen(NamedTuple):
    """What a block held at some time.

    Attributes:
        tables: Attributes of each module looked at, and what they were.
        mutable: Objects that attributes lead to.
        read: What those held.
    """

    tables: Sequence[tuple[dict[str, Any], list[Any]]]
    mutable: tuple[Any, ...]
    read: object

    @classmethod
    def of(cls, modules: Sequence[nn.Module], mutable: tuple[Any, ...]) -> Self:
        """Note down what modules hold now."""
        tables = [(m.__dict__, list(m.__dict__.values())) for m in modules]
        return cls(tables, mutable, _contents(mutable))

    def holds(self) -> bool:
        """Whether nothing was changed since."""
        for table, values in self.tables:
            if len(table) != len(values) or not all(map(operator.is_, table.values(), values)):
                return False
        return _contents(self.mutable) == self.read


def _contents(values: tuple[Any, ...]) -> object:
    seen: dict[int, object] = {}
    return [contents(value, seen) for value in values]
