"""Match the blocks of two models, so that a dropped block is one dropped block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TypeVar

T = TypeVar("T")
Key = Callable[[T], Hashable]


def align(
    old: Sequence[T], new: Sequence[T], keys: Sequence[Key[T]]
) -> Iterator[tuple[T | None, T | None]]:
    """Yield pairs in order; None stands for nothing on that side.

    Args:
        old: One sequence.
        new: Another.
        keys: What makes two items the same, most telling first. Items equal by the first key are
            matched in order; what lies between two matches is matched by the next. A key of None
            says nothing. Where as many items are left on both sides, they are paired.
    """
    if not keys or not old or not new:
        yield from _rest(old, new)
        return
    key, *others = keys
    left = [_key(key, item, index, "old") for index, item in enumerate(old)]
    right = [_key(key, item, index, "new") for index, item in enumerate(new)]
    i = j = 0
    for a, b, size in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        yield from align(old[i:a], new[j:b], others)
        yield from zip(old[a : a + size], new[b : b + size], strict=True)
        i, j = a + size, b + size


def _key(key: Key[T], item: T, index: int, side: str) -> Hashable:
    found = key(item)
    return ("nothing", side, index) if found is None else ("key", found)


def _rest(old: Sequence[T], new: Sequence[T]) -> Iterator[tuple[T | None, T | None]]:
    if len(old) == len(new):
        yield from zip(old, new, strict=True)
        return
    yield from ((item, None) for item in old)
    yield from ((None, item) for item in new)
