"""Blocks that must not change, and do not show what is inside, while others are exported."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

from torch import nn

from .contents import contents


class Unfit(Exception):
    """The model cannot be captured block by block."""


class _Hidden(dict[str, Any]):
    """An empty table that remembers which names it hides, and tells whoever asks for one."""

    def __init__(self, held: dict[str, Any]) -> None:
        super().__init__()
        self.held = held

    def __contains__(self, name: object) -> bool:
        if name in self.held:
            raise Unfit(f"something reads {name} of a block from outside")
        return False


@contextlib.contextmanager
def hidden(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Hide what is inside blocks from whoever walks the model."""
    kept = [{name: block.__dict__[name] for name in _TABLES} for block in blocks]
    try:
        for block, tables in zip(blocks, kept, strict=True):
            block.__dict__.update({name: _Hidden(held) for name, held in tables.items()})
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
