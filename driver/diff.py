"""Compare two programs: in words, region by region, node by node.

    blocks 0-5: 6 linear layers float32 -> int8 weights (group 32); bytes -72 %
    block 7: dropped

Blocks are matched by what they hold, then by their path, then by their structure, so a dropped
block is one dropped block and not a shift of all that follow. Equal changes of neighbours are said
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends.report import change, count, size
from ..ir.graphs import output_nodes
from ..ir.program import Program
from ..ir.shapes import dims
from ..ir.text import diff_text
from .diff_align import align
from .diff_units import Part, Unit, units
from .diff_words import changes, differs, part_text, rows

_NUMBERED = re.compile(r"(?:(.*)\.)?(\d+)")
_TOTALS = {"parameters": count, "weight_bytes": size, "flops": count, "bytes_moved": size}
Pair = tuple[Unit | None, Unit | None]


@dataclass(frozen=True)
class Change:
    """A change of one block, or one that neighbours have in common.

    Attributes:
        where: The blocks in words, as in `blocks 0-5`.
        words: What changed.
        old: Their labels in the old program.
        new: Their labels in the new one.
    """

    where: str
    words: tuple[str, ...]
    old: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        """Render in one line."""
        return f"{self.where}: {'; '.join(self.words)}"


@dataclass(frozen=True)
class Row:
    """A part of a block in both programs.

    Attributes:
        block: Label of the block.
        old: The part in the old program; None when it was added.
        new: The part in the new one; None when it was dropped.
    """

    block: str
    old: Part | None
    new: Part | None

    @property
    def changed(self) -> bool:
        """Whether it is another part, or costs something else."""
        return differs(self.old, self.new)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        one = self.new or self.old
        assert one is not None
        about = {"block": self.block, "role": one.role, "path": one.path, "changed": self.changed}
        return about | {"old": _part(self.old), "new": _part(self.new)}


@dataclass(frozen=True)
class Diff:
    """Two programs side by side.

    Attributes:
        old: One program.
        new: The other.
        names: What they are called.
        pairs: Blocks matched, in order, and what is outside of blocks.
    """

    old: Program
    new: Program
    names: tuple[str, str]
    pairs: tuple[Pair, ...]

    @property
    def equal(self) -> bool:
        """Whether graphs, weights and the way of calling agree."""
        return not self.changes() and not self.signature() and not self.text()

    def changes(self) -> list[Change]:
        """Return what changed, block by block, equal changes of neighbours together."""
        found = [(pair, changes(*pair)) for pair in self.pairs]
        groups: list[tuple[list[Pair], tuple[str, ...]]] = []
        for pair, words in found:
            if groups and groups[-1][1] == words and _follow(groups[-1][0][-1], pair):
                groups[-1][0].append(pair)
            else:
                groups.append(([pair], words))
        single = len({s for s in map(_stem, self._labels()) if s is not None}) == 1
        return [
            Change(_where(pairs, single), words, _side(pairs, 0), _side(pairs, 1))
            for pairs, words in groups
            if words
        ]

    def signature(self) -> list[str]:
        """Say how inputs, outputs and state changed."""
        sides = [_signature(program) for program in (self.old, self.new)]
        return [
            f"{name}: {sides[0][name]} -> {sides[1][name]}"
            for name in sides[0]
            if sides[0][name] != sides[1][name]
        ]

    def notes(self) -> list[str]:
        """Say what was not compared."""
        sides = zip(self.names, (self.old, self.new), strict=True)
        return [
            f"{name} has shapes and no weights, so values are not compared."
            for name, program in sides
            if any(tensor.is_meta for tensor in program.tensors.values())
        ]

    def totals(self) -> list[tuple[str, str, str, str]]:
        """Return name, old, new and change of what the whole model costs."""
        old, new = self.old.cost().to_json(), self.new.cost().to_json()
        return [
            (name.replace("_", " "), show(old[name]), show(new[name]), change(old[name], new[name]))
            for name, show in _TOTALS.items()
        ]

    def rows(self, *, all_: bool = False) -> list[Row]:
        """Return the parts of all blocks side by side, changed ones alone by default."""
        found = [
            Row((old or new).label if old or new else "", *parts)  # type: ignore[union-attr]
            for old, new in self.pairs
            for parts in rows(old, new)
        ]
        return [row for row in found if all_ or row.changed]

    def text(self) -> str:
        """Return a unified diff of the graphs as text, each class of blocks once."""
        matched = {
            old.label: new.label
            for old, new in self.pairs
            if old and new and old.label in self.old.instances and new.label in self.new.instances
        }
        return diff_text(self.old, self.new, self.names, matched)

    def to_json(self, *, all_: bool = False) -> dict[str, Any]:
        """Return all three levels as plain data."""
        return {
            "equal": self.equal,
            "summary": [
                {"where": c.where, "words": list(c.words), "old": list(c.old), "new": list(c.new)}
                for c in self.changes()
            ],
            "signature": self.signature(),
            "notes": self.notes(),
            "cost": {"old": self.old.cost().to_json(), "new": self.new.cost().to_json()},
            "regions": [row.to_json() for row in self.rows(all_=all_)],
            "diff": self.text(),
        }

    def _labels(self) -> Iterator[str]:
        return (unit.label for pair in self.pairs for unit in pair if unit is not None)


def diff(old: Program, new: Program, names: tuple[str, str] = ("old", "new")) -> Diff:
    """Compare two programs.

    Args:
        old: One program.
        new: Another; blocks may be dropped, added, renamed or rewritten.
        names: What to call them in texts.
    """
    (before, outside), (after, rest) = units(old), units(new)
    keys = [Unit.fingerprint, lambda u: u.label, lambda u: u.body.structure]
    return Diff(old, new, names, (*align(before, after, keys), (outside, rest)))


def _part(part: Part | None) -> dict[str, Any] | None:
    if part is None:
        return None
    cost = {"flops": part.flops, "bytes": part.size_bytes}
    return {"text": part_text(part), "constants": dict(part.constants)} | cost


def _signature(program: Program) -> Mapping[str, str]:
    signature = program.signature
    inputs = [f"{s.name} {_type(s.dtype)}[{_sizes(s.shape)}]" for s in signature.inputs]
    values = [n.meta.get("val") for n in output_nodes(program.main)]
    outputs = [
        f"{_type(v.dtype)}[{_sizes(dims(v, signature.symbols))}]" for v in values
        if isinstance(v, Tensor)
    ]  # fmt: skip
    return {
        "inputs": ", ".join(inputs),
        "outputs": ", ".join(outputs),
        "state": ", ".join(slot.name for slot in program.state) or "none",
    }


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: Sequence[object]) -> str:
    return ", ".join(map(str, shape))


def _stem(label: str) -> str | None:
    """Return what a label is without its number; None for one without."""
    match = _NUMBERED.fullmatch(label)
    return (match[1] or "") if match else None


def _follow(one: Pair, other: Pair) -> bool:
    """Whether two pairs are neighbours on both sides, so that a range can name both."""
    for a, b in zip(one, other, strict=True):
        if (a is None) is not (b is None):
            return False
        if a is not None and b is not None:
            first, second = _NUMBERED.fullmatch(a.label), _NUMBERED.fullmatch(b.label)
            if not first or not second or first[1] != second[1]:
                return False
            if int(second[2]) != int(first[2]) + 1:
                return False
    return True


def _side(pairs: Sequence[Pair], side: int) -> tuple[str, ...]:
    return tuple(unit.label for pair in pairs if (unit := pair[side]) is not None)


def _where(pairs: Sequence[Pair], single: bool) -> str:
    """Name blocks by their numbers, with the stack's path where a model has several."""
    old, new = _side(pairs, 0), _side(pairs, 1)
    named = _named(old or new, single)
    return named if not old or not new or old == new else f"{named} (now {_named(new, True)})"


def _named(labels: Sequence[str], single: bool) -> str:
    first, last = _NUMBERED.fullmatch(labels[0]), _NUMBERED.fullmatch(labels[-1])
    if not first or not last:
        return labels[0]
    numbers = first[2] if len(labels) == 1 else f"{first[2]}-{last[2]}"
    if not single:
        return f"{first[1]}.{numbers}"
    return f"{'block' if len(labels) == 1 else 'blocks'} {numbers}"
