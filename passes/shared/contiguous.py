"""Where runs of blocks that one block can stand for begin and end.

Starting from block u, the similarity of its probes with blocks u+1, u+2, ... falls. As long as it
falls no faster from block to block, another block costs little; where the fall turns upwards the
interval ends, and the next begins behind it.

Source: Ma et al., PPCL, 2025, arXiv:2511.16156 (first-order difference of the CKA).
Differs: an interval has two blocks at least, and what is compared is the stream after block k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.recognize import Block
from .bypass import cannot_bypass


@dataclass(frozen=True)
class Run:
    """Blocks of a stack, one after the other, all but one of which can go.

    Attributes:
        blocks: One or more.
        similarity: Per block, of probes from the first block up to it with the stream behind it;
            none when not measured.
    """

    blocks: tuple[Block, ...]
    similarity: tuple[float, ...] = ()

    @property
    def given_up(self) -> int:
        """How many blocks go."""
        return len(self.blocks) - 1

    @property
    def loss(self) -> float:
        """Similarity that is lost per block that goes."""
        return (1 - self.similarity[-1]) / self.given_up

    def shortened(self, given_up: int) -> Run:
        """Return the run of which so many blocks go."""
        return Run(self.blocks[: given_up + 1], self.similarity[: given_up + 1])


def detected(
    blocks: Sequence[Block], similarity: Sequence[Sequence[float]], tolerance: float
) -> list[Run]:
    """Return the runs of a stack that give up a block at least, in order.

    Args:
        blocks: The stack.
        similarity: Per block u, that of u, u+1, ... to the last; see `probes.Probes`.
        tolerance: Rise of the fall that does not count as one.
    """
    removable = [cannot_bypass(block) is None for block in blocks]
    found: list[Run] = []
    start = 0
    while start < len(blocks):
        length = 1 + grown(similarity[start], removable[start:], tolerance)
        run = Run(tuple(blocks[start : start + length]), tuple(similarity[start][:length]))
        found += [run] if run.given_up else []
        start += length
    return found


def grown(similarity: Sequence[float], removable: Sequence[bool], tolerance: float) -> int:
    """Return how many blocks after the first a run takes in."""
    last = float("inf")
    for length, (before, after) in enumerate(pairwise(similarity)):
        if not removable[length + 1] or before - after > last + tolerance:
            return length
        last = before - after
    return len(similarity) - 1


def within_budget(runs: Iterable[Run], budget: int) -> list[Run]:
    """Return runs that give up so many blocks at most, those of least loss per block first.

    The last one that is taken is shortened to fit.
    """
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: run.loss):
        taken = min(run.given_up, budget)
        kept += [run.shortened(taken)] if taken else []
        budget -= taken
    return kept


def named(owner: str, intervals: Sequence[tuple[int, int]], program: Program) -> list[Run]:
    """Return the runs that users ask for by the indices of their first and last blocks.

    Args:
        owner: The pass, for errors.
        intervals: Counted from 0 over the whole model, negative from the end; the last is in it.
        program: The model.

    Raises:
        OptionError: An interval is out of range, overlaps another, lies in two stacks, or holds a
            block that the model cannot do without.
    """
    blocks = program.blocks()
    stacks = [[block.label for block in stack.blocks] for stack in program.stacks()]
    found: list[Run] = []
    taken: set[str] = set()
    for interval in intervals:
        start, stop = (i + len(blocks) * (i < 0) for i in interval)
        what = f"{owner}: the interval {list(interval)}"
        if not 0 <= start <= stop < len(blocks):
            raise OptionError(
                f"{what} is none of a model of {len(blocks)} blocks.",
                remedy="give the first and the last block, counted from 0 over all blocks.",
            )
        run = blocks[start : stop + 1]
        labels = [block.label for block in run]
        where = f"{labels[0]} to {labels[-1]}"
        if not any(
            labels == stack[i : i + len(run)] for stack in stacks for i in _at(stack, labels)
        ):
            raise OptionError(
                f"{what} runs over two stacks.",
                where=where,
                remedy="give one interval per stack: streams change between them.",
            )
        if taken.intersection(labels):
            raise OptionError(f"{what} overlaps another one.", where=where)
        for block in run[1:]:
            if reason := cannot_bypass(block):
                raise OptionError(f"{what} gives up a block that {reason}.", where=block.label)
        taken.update(labels)
        found.append(Run(tuple(run)))
    return found


def _at(stack: Sequence[str], labels: Sequence[str]) -> list[int]:
    return [stack.index(labels[0])] if labels[0] in stack else []
