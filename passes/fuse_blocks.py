"""Fuse blocks into their neighbours: one goes, and those around it take up its weights.

    x -> 0 -> 1 -> 2 -> 3 -> y        x -> 0' -> 1' -> 3' -> y        W' = W + B A + (P Q) * W_2

Again and again the block goes that the end of its stack misses least. The group around it is
trained to give what it gave with it, on what came in; the rest of the model takes no part. What is
trained folds into ordinary weights, so the result is an ordinary model of fewer blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Block
from ..ir.recognize.place import Place
from ..ir.recognize.stack import Stack
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.bypass import bypass, cannot_bypass
from .shared.grafts import FORMS, can_take_up, grafted
from .shared.influence import macro_influence
from .shared.losses import batch_kl, pairs, soft_kl
from .shared.recovery import Stage

ROUNDING = 1e-9  # what a product of fractions and whole numbers may lack


@dataclass(frozen=True)
class Fuse:
    """Into what a block goes.

    Attributes:
        depth: Blocks the model had before; the next to go has one less.
        group: Blocks around it that take it up, in order.
        influence: What the end of the stack misses without it, from 0 up; None if not measured.
    """

    depth: int
    group: list[str]
    influence: float | None = None


@dataclass(frozen=True, kw_only=True)
class FuseBlocks(Pass[Block, Fuse]):
    """Fuse the blocks of least macro influence into the blocks around them, one after the other.

    Attributes:
        keep_ratio: Fraction of the blocks that stay, rounded down to whole blocks.
        blocks: Labels of the blocks to fuse, in this order, as `program.blocks()` has them;
            `keep_ratio` then says nothing.
        group: Blocks in a group, the one that goes among them; a shorter stack is one group.
        coefficient: What the weights of the block are multiplied with before they are added: a
            `low_rank` matrix, one number per output (`row`), a whole `matrix`, or `none`, which
            leaves the group with its low-rank corrections alone.
        rank: Largest rank of coefficients and corrections.
        loss: What tells the outputs of a group apart: `mse`, `kl_feature` (along the features), or
            `kl_batch` (along the batch, as the released code has it).
        epochs: How often a group goes through the calibration.
        rate: Learning rate of coefficients.
        base_rate: Learning rate of everything else: corrections, biases, norms.
        samples: Calibration sets that influence is measured on.
        include: Glob patterns of blocks that may go.
        exclude: Glob patterns of blocks that stay.

    Raises:
        OptionError: An option is out of range, no block would be left, or a block is not there.

    Source: Pei et al., FuseGPT, 2024, arXiv:2411.14507, and the code released with it.
    Differs: any transformer, all streams of a block; the error is squared by default; grafts fold
        after each round, and later rounds train new ones; candidates are not fused on trial.
    Exact when: `keep_ratio` is 1, or a block adds nothing to its streams and nothing is trained.
    """

    name: ClassVar[str] = "fuse-blocks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must graft"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"keep_ratio": 0.6},)
    keep_ratio: float = 0.75
    blocks: tuple[str, ...] = ()
    group: int = 8
    coefficient: str = "low_rank"
    rank: int = 128
    loss: str = "mse"
    epochs: int = 20
    rate: float = 1e-3
    base_rate: float = 9.65e-6
    samples: int = 4
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "coefficient", self.coefficient, FORMS)
        require_choice(self.name, "loss", self.loss, tuple(LOSSES))
        self._require("keep_ratio", 0 < self.keep_ratio <= 1, "more than 0 and at most 1")
        self._require("group", self.group >= 2, "2 or more")
        for option in ("rank", "epochs", "samples"):
            self._require(option, getattr(self, option) >= 1, "1 or more")
        for option in ("rate", "base_rate"):
            self._require(option, getattr(self, option) > 0, "a positive number")
        self._require("blocks", len(set(self.blocks)) == len(self.blocks), "each block once")

    def _require(self, option: str, fits: bool, words: str) -> None:
        if not fits:
            value = getattr(self, option)
            raise OptionError(f"{self.name}: {option}={value} is out of range; use {words}.")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def rounds(self, program: Program) -> int:
        if self.blocks:
            self._require_remaining(program)
            return len(self.blocks)
        count = len(program.blocks())
        kept = math.floor(self.keep_ratio * count + ROUNDING)
        if count > 1 and not kept:
            raise OptionError(
                f"{self.name}: keep_ratio={self.keep_ratio} of {count} blocks keeps none.",
                remedy=f"use at least {1 / count:.3g}.",
            )
        return count - kept

    def part(self, plan: Plan[Fuse], number: int) -> Plan[Fuse]:
        order = sorted(plan.decisions.items(), key=lambda item: -item[1].depth)
        return Plan(dict(order[number : number + 1]), plan.skips)

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        if self.blocks or self.keep_ratio == 1:
            return None
        sets = list(islice(calibration, self.samples))
        stacks = [macro_influence(program, stack, sets) for stack in program.stacks()]
        return Evidence(len(sets), {label: i for stack in stacks for label, i in stack.items()})

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Fuse]:
        influence = evidence.regions if evidence else {}
        depth = len(program.blocks())
        free: dict[str, Fuse] = {}
        skips: dict[str, str] = {}
        for stack in program.stacks():
            for index, block in enumerate(stack.blocks):
                around = self._around(stack, index)
                if isinstance(around, Skip):
                    skips[block.label] = around.reason
                else:
                    free[block.label] = Fuse(depth, around, influence.get(block.label))
        chosen = self._named(program, skips) if self.blocks else self._least(free)
        stay = {label: "is kept: another matters less" for label in free if label not in chosen}
        return Plan({label: free[label] for label in chosen}, {**skips, **stay})

    def decide(self, region: Block) -> Fuse | Skip:
        """Say into what a block would go; which one goes is up to `plan`."""
        at = {
            block.label: (stack, index)
            for stack in region.program.stacks()
            for index, block in enumerate(stack.blocks)
        }
        around = self._around(*at[region.label])
        return around if isinstance(around, Skip) else Fuse(len(at), around)

    def replace(self, region: Block, decision: Fuse) -> nn.Module:
        return bypass(region)

    def recovery(self, old: Program, new: Program, plan: Plan[Fuse]) -> Sequence[Stage]:
        return [self._stage(old, new, label, fuse) for label, fuse in plan.decisions.items()]

    def _around(self, stack: Stack, index: int) -> list[str] | Skip:
        """Return the labels of the blocks that a block of a stack would go into."""
        block = stack.blocks[index]
        others = [b for b in group_of(stack.blocks, index, self.group) if b is not block]
        reason = cannot_bypass(block)
        if not selected(block.label, self.include, self.exclude):
            reason = "is excluded by pattern"
        elif not others:
            reason = "is the only block of its stack"
        elif reason is None and not any(can_take_up(other, block) for other in others):
            reason = "has no block like it in its group, with dense weights of its own"
        return Skip(reason, at=block) if reason else [other.label for other in others]

    def _least(self, free: Mapping[str, Fuse]) -> list[str]:
        """Return the label of the block that is missed least."""
        measured = {label: f.influence for label, f in free.items() if f.influence is not None}
        if self.keep_ratio == 1 or not free:
            return []
        if not measured:
            raise OptionError(
                f"{self.name} chooses blocks by their influence, and nobody has measured it.",
                remedy="give calibration=..., or name the blocks.",
            )
        return [min(measured, key=measured.__getitem__)]

    def _named(self, program: Program, skips: Mapping[str, str]) -> list[str]:
        """Return the first of the blocks given by label that is still there."""
        known = {block.label for block in program.blocks()}
        label = next((label for label in self.blocks if label in known), None)
        if label is None:
            raise self._unknown(self.blocks[0], known)
        if label in skips:
            raise OptionError(f"{self.name} cannot fuse the block: it {skips[label]}.", where=label)
        return [label]

    def _require_remaining(self, program: Program) -> None:
        """Refuse blocks that are not there, and stacks of which nothing would be left."""
        known = {block.label for block in program.blocks()}
        for label in self.blocks:
            if label not in known:
                raise self._unknown(label, known)
        for stack in program.stacks():
            if {block.label for block in stack.blocks} <= set(self.blocks):
                raise OptionError(
                    f"{self.name} would fuse all {len(stack.blocks)} blocks of a stack.",
                    where=stack.label or stack.blocks[0].label,
                    remedy="leave one of them out of blocks=...",
                )

    def _unknown(self, label: str, known: Collection[str]) -> OptionError:
        listed = ", ".join(sorted(known)[:4]) or "none"
        return OptionError(
            f"{self.name}: there is no block {label!r}; the model has {len(known)}.",
            remedy=f"use labels as program.blocks() has them: {listed}.",
        )

    def _stage(self, old: Program, new: Program, label: str, fuse: Fuse) -> Stage:
        """Return the training of a group, on what came in and towards what went out."""
        (gone,) = [block for block in old.blocks() if block.label == label]
        group = [block for block in new.blocks() if block.label in fuse.group]
        starts, ends = ends_of(new, fuse.group)
        given, wanted = ends_of(old, {label, *fuse.group})
        return Stage(
            name=f"group of {label}",
            weights=grafted(group, gone, rank=self.rank, form=self.coefficient),
            loss=pairs(ends, wanted, LOSSES[self.loss]),
            feeds=list(zip(starts, given, strict=True)),
            epochs=self.epochs,
            rate=self.base_rate,
            rates={"coef*": self.rate},
            warm_up=0.0,
            clip=None,
        )


def group_of(blocks: Sequence[Block], index: int, size: int) -> Sequence[Block]:
    """Return the blocks around one: half of them before it, or as near to that as the ends allow.

    Source: the code released with FuseGPT, Pei et al., 2024, arXiv:2411.14507.
    """
    size = min(size, len(blocks))
    start = min(max(index - size // 2, 0), len(blocks) - size)
    return blocks[start : start + size]


def ends_of(program: Program, labels: Collection[str]) -> tuple[list[Place], list[Place]]:
    """Return the streams before the first and after the last of some blocks of a stack."""
    for stack in program.stacks():
        found = [i for i, block in enumerate(stack.blocks) if block.label in labels]
        if found:
            before, after = stack.cuts[found[0]], stack.cuts[found[-1] + 1]
            return [place for place in before if place], [place for place in after if place]
    raise AssertionError("a group is in a stack")


def along_the_batch(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the divergence of outputs normalised over the samples of a batch.

    Raises:
        OptionError: The batch is one sample, for which it is always zero.
    """
    if len(ours) == 1:
        raise OptionError(
            "kl_batch compares the samples of a batch, and a calibration set has one alone.",
            remedy="calibrate on larger batches, or use loss=mse or loss=kl_feature.",
        )
    return batch_kl(ours, theirs)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.mse_loss,
    "kl_feature": soft_kl,
    "kl_batch": along_the_batch,
}
