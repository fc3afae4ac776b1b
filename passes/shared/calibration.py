"""Inputs to calibrate on, as passes are given them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ...ir.errors import OptionError

Calibration = Iterable[Sequence[Tensor]]  # flat inputs of `main`, as often as one asks


@runtime_checkable
class Judged(Protocol):
    """Calibration inputs with what the model should make of them."""

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        """Yield flat inputs of `main`."""

    def pairs(self) -> Iterator[tuple[Sequence[Tensor], Any]]:
        """Yield flat inputs and their target."""

    def loss(self, outputs: Sequence[Tensor], target: Any) -> Tensor:
        """Return the loss of each sample, [batch], of the program's flat outputs."""


def judged(calibration: Calibration, by: str) -> Judged:
    """Return calibration inputs that come with targets and a loss.

    Raises:
        OptionError: They do not.
    """
    if isinstance(calibration, Judged):
        return calibration
    raise OptionError(
        f"{by} judges by the loss of a task, and there is none.",
        remedy="pass loss=... and give the calibration as pairs (inputs, target).",
    )


def count_of(calibration: Calibration) -> int:
    """Return how many input sets there are, read through only where they do not tell."""
    told = operator.length_hint(calibration, -1)
    return sum(1 for _ in calibration) if told < 0 else told
