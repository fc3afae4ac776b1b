"""Drop whole residual blocks.

    x -> block 0 -> block 1 -> block 2 -> y        x -> block 0 -> block 2 -> y

A block adds to its streams, so without it they simply pass. The plain baseline of every method that
makes a model shallower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Block
from .base import (
    Calibration,
    Evidence,
    Pass,
    Plan,
    Promise,
    Skip,
    count_of,
    require_choice,
    selected,
)
from .shared.bypass import bypass, cannot_bypass, entangled
from .shared.influence import (
    Drop,
    block_influence,
    least_first,
    needs_calibration,
    require_fraction,
)


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass[Block, Drop]):
    """Drop the blocks of least influence, blocks by index, or random ones.

    Attributes:
        keep_ratio: Fraction of the blocks that stay, rounded to whole blocks; of every stack at
            least one does.
        blocks: Indices of the blocks to drop, counted from 0 over the whole model, negative from
            the end; `keep_ratio` and `importance` then say nothing.
        importance: `cosine` drops the blocks that turn their streams least, measured on the
            calibration; `random` any.
        seed: Draws the random blocks.
        include: Glob patterns of blocks that may be dropped.
        exclude: Glob patterns of blocks that stay.

    Raises:
        OptionError: An option is out of range, or `blocks` are all there are of a stack.

    Source: Men et al., ShortGPT, 2024, arXiv:2403.03853, section 3.
    Differs: blocks of any transformer; influence is the mean over all streams of a block.
    Exact when: `keep_ratio` is 1, or a dropped block adds nothing to its streams.
    """

    name: ClassVar[str] = "drop-blocks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"blocks": (-1,)},)
    keep_ratio: float = 0.75
    blocks: tuple[int, ...] = ()
    importance: str = "cosine"
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "importance", self.importance, ("cosine", "random"))
        require_fraction(self.name, self.keep_ratio, of="blocks")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        if self.blocks or self.importance != "cosine":
            return None
        influence = block_influence(program, calibration)
        return Evidence(count_of(calibration), influence)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Drop]:
        blocks = program.blocks()
        skips = {b.label: s.reason for b in blocks if isinstance(s := self.decide(b), Skip)}
        skips = {**entangled(blocks), **skips}
        free = [block.label for block in blocks if block.label not in skips]
        influence = evidence.regions if evidence else {}
        if self.blocks:
            dropped = self._named(program, blocks, skips)
        else:
            count = len(blocks) - self._kept(len(blocks))
            if count and self.importance == "cosine" and not evidence:
                raise needs_calibration(self.name)
            order = least_first(free, influence, self.seed)
            dropped = set(_spare(program, order)[:count])
        stay = {label: "is kept: others matter less" for label in free if label not in dropped}
        decisions = {name: Drop(influence.get(name)) for name in free if name in dropped}
        return Plan(decisions, {**skips, **stay})

    def decide(self, region: Block) -> Drop | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        reason = cannot_bypass(region)
        return Skip(reason, at=region) if reason else Drop()

    def replace(self, region: Block, decision: Drop) -> nn.Module:
        return bypass(region)

    def _kept(self, count: int) -> int:
        kept = round(self.keep_ratio * count)
        if count and not kept:
            raise OptionError(
                f"{self.name}: keep_ratio={self.keep_ratio} of {count} blocks keeps none.",
                remedy=f"use at least {1 / count:.3g}.",
            )
        return kept

    def _named(
        self, program: Program, blocks: Sequence[Block], skips: Mapping[str, str]
    ) -> set[str]:
        """Return the labels of the blocks given by index."""
        labels: list[str] = []
        for index in self.blocks:
            if not -len(blocks) <= index < len(blocks):
                raise OptionError(
                    f"{self.name}: there is no block {index}, the model has {len(blocks)}.",
                    remedy="count from 0 over all blocks of the model.",
                )
            labels.append(blocks[index].label)
            if labels[-1] in skips:
                raise OptionError(
                    f"{self.name} cannot drop block {index}: it {skips[labels[-1]]}.",
                    where=labels[-1],
                )
        for stack in program.stacks():
            if {block.label for block in stack.blocks} <= set(labels):
                raise OptionError(
                    f"{self.name} would drop all {len(stack.blocks)} blocks of a stack.",
                    where=stack.label or stack.blocks[0].label,
                    remedy="leave one of them in.",
                )
        return set(labels)


def _spare(program: Program, order: Sequence[str]) -> list[str]:
    """Return those of some blocks that may all go: of every stack, the last in order stays."""
    place = {label: index for index, label in enumerate(order)}
    stay = {
        max((block.label for block in stack.blocks), key=lambda label: place.get(label, -1))
        for stack in program.stacks()
        if all(block.label in place for block in stack.blocks)
    }
    return [label for label in order if label not in stay]
