"""Recognise a value of one graph in another by its numbers alone.

Graphs of different origin share neither names nor layouts, but where both compute the same thing
they hold the same numbers, perhaps transposed or reshaped. Sorted, these are equal up to rounding:

    ||sort(a) - sort(b)|| <= ||a - b||        for any pairing of the elements

so that the distance of sorted values never exceeds what rounding did to them. Masks are recognised
by the share of their two values, since booleans, zeros and ones, and zeros and -inf mean the same.

Source: Hardy, Littlewood, Polya, Inequalities, 1934, section 10.2 (the rearrangement inequality).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

import torch
from torch import Tensor

INFINITE = 1e30  # numbers beyond are masks, whatever their type
SMALLEST = 8  # elements of a value that its numbers tell apart
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Fingerprint:
    """Numbers of a value without their places.

    Attributes:
        numbers: Sorted, in fp64; None for a mask.
        share: Share of the rarer of two values in a mask; None for other values.
    """

    numbers: Tensor | None
    share: Fraction | None

    @property
    def is_mask(self) -> bool:
        """Whether the value holds two numbers only."""
        return self.share is not None


def fingerprint(value: Tensor) -> Fingerprint | None:
    """Return the fingerprint of a value; None when it says too little.

    Integers say too little (shapes, positions), and so do values that are constant or short.
    """
    if value.numel() < SMALLEST or not (value.is_floating_point() or value.dtype == torch.bool):
        return None
    flat = value.detach().reshape(-1).to(torch.float64)
    huge = flat.isnan() | (flat.abs() >= INFINITE)
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        return None
    if bool(((flat == low) | (flat == high)).all()):
        count = int((flat == low).sum())
        return Fingerprint(None, Fraction(min(count, flat.numel() - count), flat.numel()))
    flat = torch.where(huge, 0.0, flat)
    return Fingerprint(flat.sort().values, None)


class Index(Generic[K]):
    """Known values, found by their numbers."""

    def __init__(self) -> None:
        self._numbers: dict[int, list[tuple[K, Tensor, float]]] = {}
        self._masks: dict[Fraction, list[K]] = {}

    def add(self, key: K, value: Tensor, rounding: float) -> None:
        """Enter a value.

        Args:
            key: What to answer.
            value: Its numbers, best in fp64.
            rounding: How far another correct computation of it may be, relative to its norm.
        """
        print_ = fingerprint(value)
        if print_ is None:
            return
        if print_.share is not None:
            self._masks.setdefault(print_.share, []).append(key)
        elif print_.numbers is not None:
            known = self._numbers.setdefault(print_.numbers.numel(), [])
            known.append((key, print_.numbers, rounding * float(print_.numbers.norm())))

    def find(self, wanted: Fingerprint) -> list[K]:
        """Return the keys of all values with these numbers."""
        if wanted.share is not None:
            return list(self._masks.get(wanted.share, ()))
        assert wanted.numbers is not None
        known = self._numbers.get(wanted.numbers.numel(), ())
        return [
            key
            for key, numbers, allowed in known
            if float((numbers - wanted.numbers).norm()) <= allowed
        ]
