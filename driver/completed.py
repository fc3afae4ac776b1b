"""Calibration inputs for a program that passes have given more arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..ir.program import Program
from ..passes.base import Calibration, Judged

C = TypeVar("C", bound=Calibration)


class Completed(Generic[C]):
    """Calibration inputs, each made as long as a program asks; see `Program.completed`."""

    def __init__(self, program: Program, source: C) -> None:
        self.program, self.source = program, source

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        return (self.program.completed(flat) for flat in self.source)

    def __length_hint__(self) -> int:
        told = operator.length_hint(self.source, -1)
        return NotImplemented if told < 0 else told


class CompletedPairs(Completed[Judged]):
    """The same, with targets."""

    def pairs(self) -> Iterator[tuple[Sequence[Tensor], Any]]:
        """Yield flat inputs and their target."""
        return ((self.program.completed(flat), target) for flat, target in self.source.pairs())

    def loss(self, outputs: Sequence[Tensor], target: Any) -> Tensor:
        """Return the loss of each sample."""
        return self.source.loss(outputs, target)


def completed(program: Program, source: Calibration) -> Calibration:
    """Return calibration inputs that a program takes, targets kept."""
    if isinstance(source, Judged):
        return CompletedPairs(program, source)
    return Completed(program, source)
