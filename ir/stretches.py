"""Find where a sequence repeats itself.

    keys:  a b [c d e c d e c d e] f        a stretch of 3 blocks of 3

A stretch is found by votes: equal runs of keys some distance apart vote for that distance as the
period. It is then cut into blocks: where residual blocks end, or else where the fewest values cross
from one block to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import fx

from .graphs import common_prefix, module_path
from .regions import find_once

WINDOWS = (64, 16, 4)  # nodes that must repeat before a stretch is looked at, longest first
CANDIDATES = 8  # periods tried per window


@dataclass(frozen=True)
class Stretch:
    """`count` blocks of `period` nodes each, from position `start`."""

    start: int
    period: int
    count: int


def find_stretches(keys: Sequence[int], nodes: Sequence[fx.Node]) -> list[Stretch]:
    """Return disjoint periodic stretches of a key sequence, in order, cut into blocks.

    Args:
        keys: What each node does.
        nodes: The nodes, of one graph.
    """
    borders: Set[int] | None = None
    claimed = [False] * len(keys)
    found: list[Stretch] = []
    for window in WINDOWS:
        grams = intern([tuple(keys[i : i + window]) for i in range(len(keys) - window + 1)])
        while True:
            run = _best_run(keys, grams, window, claimed)
            if run is None:
                break
            first, last, period = run
            borders = _borders(nodes) if borders is None else borders
            stretch = _cut(nodes, (first, last, period), borders)
            if stretch is not None:
                found.append(stretch)
                first, last = stretch.start, stretch.start + stretch.count * period
            claimed[first:last] = [True] * (last - first)
    return sorted(found, key=lambda stretch: stretch.start)


def _best_run(
    keys: Sequence[int], grams: Sequence[int], window: int, claimed: Sequence[bool]
) -> tuple[int, int, int] | None:
    """Return (first, end, period) of the periodic run that covers most unclaimed nodes."""
    last_seen: dict[int, int] = {}
    votes: Counter[int] = Counter()
    for position, gram in enumerate(grams):
        if claimed[position] or claimed[min(position + window, len(claimed)) - 1]:
            continue
        if gram in last_seen:
            votes[position - last_seen[gram]] += 1
        last_seen[gram] = position
    best: tuple[int, int, int, int] | None = None
    for period, _ in votes.most_common(CANDIDATES):
        run = _longest_run(keys, period, claimed)
        if run is None:
            continue
        covered = run[1] - run[0]
        # A multiple of the true period covers nearly as much: prefer the shorter period.
        if (
            best is None
            or covered > 1.05 * best[0]
            or (covered >= 0.95 * best[0] and period < best[3])
        ):
            best = (covered, *run, period)
    return best[1:] if best else None


def _longest_run(
    keys: Sequence[int], period: int, claimed: Sequence[bool]
) -> tuple[int, int] | None:
    best: tuple[int, int] | None = None
    start: int | None = None
    for i in range(len(keys) - period + 1):
        same = (
            i + period < len(keys)
            and keys[i] == keys[i + period]
            and not claimed[i]
            and not claimed[i + period]
        )
        if same and start is None:
            start = i
        elif not same and start is not None:
            if i - start >= period and (best is None or i + period - start > best[1] - best[0]):
                best = (start, i + period)
            start = None
    return best


def _cut(nodes: Sequence[fx.Node], run: tuple[int, int, int], borders: Set[int]) -> Stretch | None:
    """Choose where blocks begin: behind others, where fewest values cross, where modules begin."""
    first, end, period = run
    position = {node: index for index, node in enumerate(nodes[first:end], first)}
    middle = first + period * ((end - first) // period // 2)
    crossing = [0] * (period + 1)
    for node in nodes[first:end]:
        born = position[node]
        dies = max((position.get(user, end) for user in node.users), default=born)
        low, high = max(born + 1, middle), min(dies, middle + period - 1)
        if low <= high:
            crossing[low - middle] += 1
            crossing[high + 1 - middle] -= 1
    live, best = 0, None
    for offset in range(period):
        live += crossing[offset]
        start = first + (middle - first + offset) % period
        count = (end - start) // period
        if count < 2:
            continue
        prefix = len(common_prefix(map(module_path, nodes[start : start + period])).split("."))
        rank = (start + period not in borders, live, -prefix, -count, start)
        if best is None or rank < best[0]:
            best = (rank, Stretch(start, period, count))
    return best[1] if best else None


def _borders(nodes: Sequence[fx.Node]) -> set[int]:
    """Return the positions behind residual blocks."""
    from .recognize import Block

    order = {node: index for index, node in enumerate(nodes)}
    return {
        1 + max(order.get(n.stream_out, -1) for n in block.streams if n.stream_out is not None)
        for block in find_once(nodes[0].graph, Block)
    }


def intern(items: Sequence[object]) -> list[int]:
    """Number items so that equal ones get equal numbers."""
    table: dict[object, int] = {}
    return [table.setdefault(item, len(table)) for item in items]
