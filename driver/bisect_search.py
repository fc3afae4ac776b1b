"""What a bisection measures, and how it halves.

An error is no monotone function of how much of a recipe has run: two passes may cancel. What
halving finds is *a* crossing, a step with the measured error within the bound before it and beyond
it after; both sides of the answer have been measured. There may be others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import OptionError
from ..ir.program import Program
from ..ir.run import run
from ..passes.base import require_choice
from .numerics import Inputs, relative, within_rounding

METRICS = ("relative", "cosine", "rounding")


@dataclass(frozen=True)
class Bound:
    """How far outputs may move.

    Attributes:
        limit: Largest error allowed; None for `rounding`, which has a rule of its own.
        metric: `relative`, the norm of the difference over the norm of what is expected; `cosine`,
            one minus the smallest cosine along the last axis; or `rounding`, the relative error as
            far as reassociation explains it, what exact passes are held to.

    Raises:
        OptionError: There is no such metric, or the limit does not go with it.
    """

    limit: float | None = None
    metric: str = "relative"

    def __post_init__(self) -> None:
        require_choice("bisect", "metric", self.metric, METRICS)
        if (self.limit is None) is not (self.metric == "rounding"):
            raise OptionError(
                f"the metric {self.metric} takes {'no' if self.limit is not None else 'a'} bound.",
                remedy="give --bound for relative and cosine, and none for rounding.",
            )
        if self.limit is not None and not 0 <= self.limit < float("inf"):
            raise OptionError(f"bound={self.limit} is no error; use 0 or more, as in 1e-3.")

    def __str__(self) -> str:
        """Render as in `relative error 0.001`."""
        if self.limit is None:
            return "what rounding explains"
        return f"{self.metric} error {self.limit:.3g}"

    def check(self, found: Any, expected: Any, truth: Any = None) -> Measured:
        """Compare one value with what it should be.

        Args:
            found: The value, most often a tensor.
            expected: What it should be.
            truth: The same in fp64, where `rounding` has it.
        """
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        error = distance(found, expected, self.metric)
        if self.limit is not None:
            return Measured(error, error > self.limit)
        exact = None if truth is None else torch.as_tensor(truth)
        same = found.shape == expected.shape and found.dtype == expected.dtype
        return Measured(error, not (same and within_rounding(found, expected, exact)))


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        error: By the bound's metric; infinite when shapes or NaN differ.
        beyond: Whether it exceeds the bound.
        worst: Index of the input set it was found on.
    """

    error: float
    beyond: bool
    worst: int = 0


class Evaluator:
    """Measures programs against the one they were made of, and counts its runs.

    Attributes:
        runs: Programs run so far, the reference among them.
    """

    def __init__(self, program: Program, inputs: Sequence[Inputs], bound: Bound) -> None:
        self.inputs, self.bound, self.runs = inputs, bound, 1
        self._expected = [run(program, flat) for flat in inputs]
        self._truth: list[list[Any]] | None = None
        if bound.metric == "rounding":
            self.runs += 1
            self._truth = [run(program, flat, dtype=torch.float64) for flat in inputs]

    def __call__(self, program: Program) -> Measured:
        """Run a program on every input set and return the worst of its outputs."""
        self.runs += 1
        found = [run(program, flat) for flat in self.inputs]
        return worst_of(
            [
                worst_of(
                    [
                        self.bound.check(value, *expected)
                        for value, *expected in zip(flat, *self._references(index), strict=True)
                    ]
                )
                for index, flat in enumerate(found)
            ]
        )

    def _references(self, index: int) -> list[list[Any]]:
        truth = [self._truth[index]] if self._truth else []
        return [self._expected[index], *truth]


def worst_of(measured: Sequence[Measured]) -> Measured:
    """Return the worst measurement, with its index."""
    if not measured:
        return Measured(0.0, False)
    index = max(range(len(measured)), key=lambda i: (measured[i].beyond, measured[i].error))
    return Measured(measured[index].error, measured[index].beyond, index)


def crossing(beyond: Callable[[int], bool], low: int, high: int) -> int:
    """Return an index whose predecessor is within the bound while it is beyond.

    Args:
        beyond: Measures; asked ceil(log2(high - low)) times, never about the ends.
        low: Known to be within.
        high: Known to be beyond, above `low`.
    """
    while high - low > 1:
        middle = (low + high) // 2
        if beyond(middle):
            high = middle
        else:
            low = middle
    return high


def distance(found: Tensor, expected: Tensor, metric: str = "relative") -> float:
    """Return an error as `Bound.metric` defines it; infinite when shapes or NaN differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not torch.equal(_odd(found), _odd(expected)):
        return float("inf")
    if metric != "cosine" or not _has_rows(found):
        return relative(found, expected)
    a, b = found.double().nan_to_num(), expected.double().nan_to_num()
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return max(0.0, 1.0 - float(cosines[(a != b).any(dim=-1)].amin() if (a != b).any() else 1.0))


def _odd(value: Tensor) -> Tensor:
    """Return infinities by sign, NaN as NaN's place, and zero for everything finite."""
    value = torch.where(value.isfinite(), torch.zeros_like(value), value)
    return value.double().nan_to_num(nan=1.0)


def _has_rows(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 0 and value.numel() > 0
