"""Sets of rows of a weight, as regular as layers that are cut into heads leave them.

range            start, (count, 1)
every second     start, (count, 2)
one of three in each head, as GPT-NeoX lays out query, key and value
                 start, (heads, 3 * head_dim), (head_dim, 1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor

Step = tuple[int, int]  # size, stride


@dataclass(frozen=True)
class Rows:
    """The rows `start + i * stride + j * stride' + ...` for all i < size, j < size', ...

    Attributes:
        start: The first row.
        steps: Size and stride of each loop, outermost first; no loop runs into the next round of
            the one outside it, and loops that go on where the inner one ends are one.
    """

    start: int
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, start: int, steps: Iterable[Step]) -> Self | None:
        """Return the set that loops run over; None when they meet a row twice."""
        loops = [step for step in steps if step[0] != 1]
        if len(loops) < 2:
            return cls(start, tuple(loops))
        merged: list[Step] = []
        for size, stride in sorted(loops, key=lambda step: step[1]):
            reach = merged[0][0] * merged[0][1] if merged else 0
            if stride < max(reach, 1):
                return None
            if merged and stride == reach:
                merged[0] = (size * merged[0][0], merged[0][1])
            else:
                merged.insert(0, (size, stride))
        return cls(start, tuple(merged))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return math.prod([size for size, _ in self.steps])

    @property
    def span(self) -> tuple[int, int] | None:
        """The range (start, stop), when the set is one."""
        if self.steps in ((), ((self.count, 1),)):
            return self.start, self.start + self.count
        return None

    def take(self, tensor: Tensor) -> Tensor:
        """Return these rows: a view of a range, a copy of anything else."""
        if self.span is not None:
            return tensor[slice(*self.span)]
        index = torch.tensor([self.start], device=tensor.device)
        for size, stride in self.steps:
            further = torch.arange(size, device=tensor.device) * stride
            index = (index[:, None] + further).flatten()
        return tensor[index]

    def union(self, other: Rows) -> Rows | None:
        """Return the rows of both if that is a regular set again: equal ones, or neighbours."""
        if self == other:
            return self
        one, two = sorted((self, other), key=lambda rows: rows.start)
        apart = two.start - one.start
        if one.steps == two.steps:
            return Rows.of(one.start, (*one.steps, (2, apart))) if apart else None
        *outer, (size, stride) = one.steps or ((1, 1),)
        *others, (further, pace) = two.steps or ((1, 1),)
        if outer == others and stride == pace and apart == size * stride:
            return Rows.of(one.start, (*outer, (size + further, stride)))
        return None


def united(sets: Iterable[Rows | None]) -> Rows | None:
    """Return the union of several sets; None when it is not regular, or one is unknown."""
    found = list(sets)
    if found and all(rows == found[0] for rows in found):
        return found[0]
    if any(rows is None for rows in found):
        return None
    known = sorted({rows for rows in found if rows}, key=lambda rows: rows.start)
    return reduce(lambda a, b: a and a.union(b), known) if known else None  # type: ignore[arg-type, return-value]
