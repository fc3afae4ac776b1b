"""Let one block stand for a run of blocks that are nearly linear together.

    x -> block 0 -> block 1 -> block 2 -> block 3 -> y        intervals=((1, 2),)
    x -> block 0 -> student -> block 3 -> y                   student(h_0) ~ h_2

Maps of one linear block after the other are linear again, so where blocks hardly bend their streams
a single one can learn what they do together. Each student is taught alone: it reads what the
teacher has before the interval and is compared with what the teacher has behind it. So students do
not depend on each other, and any of the intervals can be given back their blocks later.
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
)
from .shared.bypass import bypass
from .shared.contiguous import Run, detected, named, within_budget
from .shared.losses import output_kl, output_mse
from .shared.probes import probe
from .shared.recovery import Stage
from .shared.students import (
    DISTANCES,
    average,
    own_weights,
    taught,
    with_length,
)

STARTS = ("first", "middle", "last", "average")
OUTPUTS = {"mse": output_mse, "kl": output_kl}


@dataclass(frozen=True)
class Interval:
    """A run of blocks that one of them will stand for.

    Attributes:
        first: Label of its first block.
        last: Label of its last block.
        student: Label of the block that stays, with its own weights or the mean of all.
        similarity: CKA of probes in its place with the stream behind it; None when not measured.
    """

    first: str
    last: str
    student: str
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class PruneContiguous(Pass[Block, Interval]):
    """Replace intervals of blocks by one block each, taught to do the same.

    Attributes:
        keep_ratio: Fraction of the blocks that stay at least, rounded to whole blocks, where
            intervals are detected on the calibration.
        intervals: First and last block of each interval, counted from 0 over the whole model,
            negative from the end; an interval (u, v) gives up v - u blocks. None to detect them.
        start: Whose weights the student starts from: the `first`, `middle` or `last` block of its
            interval, or the `average` of all.
        distance: What students are taught by: `direction_mse` or `direction_l1` between vectors
            scaled to length one, or `mse`.
        length: Weight of the relative error of the vectors' lengths, which directions leave free.
        sequential: Let students read what the students before them make, instead of the teacher's
            values; the baseline of the method.
        epochs: How often students see the calibration.
        rate: Learning rate of students.
        fine_tune_epochs: Epochs in which all weights are trained afterwards, at a tenth of `rate`.
        output: What those epochs compare outputs by: `mse`, or `kl` of logits.
        tolerance: How much faster the similarity may fall from block to block before an interval
            ends.

    Raises:
        OptionError: An option is out of range; intervals overlap, run over two stacks, or hold a
            block the model cannot do without.

    Source: Ma et al., PPCL, 2025, arXiv:2511.16156.
    Differs: blocks of any transformer; a student keeps the name of the block it starts from;
        probes are not trained after the closed form; a budget takes the cheapest intervals first.
    Exact when: no interval has two blocks, or those behind its first add nothing.
    """

    name: ClassVar[str] = "prune-contiguous"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.DISTINCT_BLOCKS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must train"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"intervals": ((-2, -1),)},)
    keep_ratio: float = 0.6
    intervals: tuple[tuple[int, int], ...] | None = None
    start: str = "first"
    distance: str = "direction_mse"
    length: float = 0.0
    sequential: bool = False
    epochs: int = 1
    rate: float = 1e-3
    fine_tune_epochs: int = 0
    output: str = "mse"
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_choice(self.name, "start", self.start, STARTS)
        require_choice(self.name, "distance", self.distance, tuple(DISTANCES))
        require_choice(self.name, "output", self.output, tuple(OUTPUTS))
        if not 0 < self.keep_ratio <= 1:
            raise OptionError(
                f"{self.name}: keep_ratio={self.keep_ratio} is no fraction of blocks to keep.",
                remedy="use more than 0 and at most 1.",
            )
        if min(self.length, self.tolerance, self.fine_tune_epochs) < 0:
            raise OptionError(
                f"{self.name}: length={self.length}, tolerance={self.tolerance},"
                f" fine_tune_epochs={self.fine_tune_epochs}.",
                remedy="use 0 or more.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        if self.intervals is not None:
            return None
        found: dict[str, dict[str, list[float]]] = {}
        for stack in program.stacks():
            probes = probe(stack, calibration)
            rows = zip(stack.blocks, probes.errors, probes.similarity, strict=True)
            # Rounded: the last digits of a sum depend on where its terms lie in memory.
            found |= {
                b.label: {
                    "errors": [round(error, 9) for error in e],
                    "similarity": [round(value, 9) for value in s],
                }
                for b, e, s in rows
            }
        return Evidence(count_of(calibration), found)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Interval]:
        decisions: dict[str, Interval] = {}
        students: set[str] = set()
        for run in self._runs(program, evidence):
            interval = self._interval(run)
            labels = {block.label for block in run.blocks}
            students.add(interval.student)
            gone = labels if self.start == "average" else labels - {interval.student}
            decisions |= dict.fromkeys(gone if run.given_up else (), interval)
        order = [block.label for block in program.blocks()]
        return Plan(
            {label: decisions[label] for label in order if label in decisions},
            {
                label: "stays as a student" if label in students else "is in no interval"
                for label in order
                if label not in decisions
            },
        )

    def decide(self, region: Block) -> Interval | Skip:
        return Skip("is in no interval", at=region)

    def replace(self, region: Block, decision: Interval) -> nn.Module:
        if region.label != decision.student:
            return bypass(region)
        blocks = {block.label: block for block in region.program.blocks()}
        order = list(blocks)
        ends = order.index(decision.first), order.index(decision.last)
        return average([blocks[label] for label in order[ends[0] : ends[1] + 1]])

    def recovery(self, old: Program, new: Program, plan: Plan[Interval]) -> Sequence[Stage]:
        students = {interval.student: interval for interval in plan.decisions.values()}
        blocks = [block for block in new.blocks() if block.label in students]
        distance = with_length(DISTANCES[self.distance], self.length)
        runs = [(i.first, i.last, i.student) for i in students.values()]
        loss, feeds = taught(old, new, runs, distance)
        weights = [name for block in blocks for name in own_weights(new, block).values()]
        distil = Stage(
            name="distil",
            weights=dict.fromkeys(weights),
            loss=loss,
            feeds=() if self.sequential else feeds,
            epochs=self.epochs,
            rate=self.rate,
        )
        if not self.fine_tune_epochs:
            return [distil]
        everything = [n for n in new.parameters if new.tensors[n].is_floating_point()]
        fine_tune = Stage(
            name="fine-tune",
            weights=dict.fromkeys(sorted(everything)),
            loss=OUTPUTS[self.output](old, new),
            epochs=self.fine_tune_epochs,
            rate=self.rate / 10,
        )
        return [distil, fine_tune]

    def statistics(self, plan: Plan[Interval]) -> Mapping[str, int]:
        intervals = len({interval.first for interval in plan.decisions.values()})
        gone = sum(label != i.student for label, i in plan.decisions.items())
        return {"intervals": intervals, "removed": gone}

    def _runs(self, program: Program, evidence: Evidence | None) -> list[Run]:
        """Return the runs that are named, or those that evidence speaks for."""
        if self.intervals is not None:
            return named(self.name, self.intervals, program)
        count = len(program.blocks())
        if count and not round(self.keep_ratio * count):
            raise OptionError(
                f"{self.name}: keep_ratio={self.keep_ratio} of {count} blocks keeps none.",
                remedy=f"use at least {1 / count:.3g}.",
            )
        found = evidence.regions if evidence else {}
        runs = [
            run
            for stack in program.stacks()
            for run in detected(
                stack.blocks, [found[b.label]["similarity"] for b in stack.blocks], self.tolerance
            )
        ]
        return within_budget(runs, count - round(self.keep_ratio * count))

    def _interval(self, run: Run) -> Interval:
        """Return what becomes of a run of blocks."""
        labels = [block.label for block in run.blocks]
        at = {"middle": run.given_up // 2, "last": -1}.get(self.start, 0)
        if self.start == "average" and len({block.structure for block in run.blocks}) > 1:
            raise OptionError(
                f"{self.name} cannot average blocks that differ.",
                where=f"{labels[0]} to {labels[-1]}",
                remedy="use start=first, middle or last.",
            )
        return Interval(
            labels[0], labels[-1], labels[at], run.similarity[-1] if run.similarity else None
        )
