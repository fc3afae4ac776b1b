"""Leave stages of a chain out on some steps of a sampler.

    z_k = brick_k(z_(k-1), x)            at steps for which the schedule says so: z_k = z_(k-1)

Bricks work on one image, each improving the estimate of the one before, so any but the first can be
left out. The schedule is a table in the program and the step an argument: one graph serves all
steps, and what is left out is not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..ir.arguments import with_argument
from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.only_when import OnlyWhen
from ..ir.program import Program
from ..ir.recognize.chain import Chain, Stages, blocks_of, estimates_of
from .base import Pass, Promise, Skip, require_choice
from .shared.bypass import Bypass

STEP = "step"  # name of the argument that says which step it is, counted from 0


@dataclass(frozen=True, kw_only=True)
class SkipBricks(Pass[Stages, str]):
    """Compute the last bricks, or any, only on some of the steps.

    Attributes:
        steps: Steps of the sampler. The program gets an argument `step`, from 0 to `steps` - 1;
            all calls of one step (predictor and corrector, with guidance and without) give it.
        skip_ratio: Fraction of the steps without the last `count` bricks.
        when: Whether these are the `early` steps, of much noise, or the `late` ones.
        count: Bricks left out, from the last one backwards.
        masks: One text for all steps, `1` and `0` for each brick from the first to the last; says
            on its own what is left out, one text per step.
        stages: `bricks`, a chain of estimates of the result; or `blocks` of stacks, which pass
            their streams on.

    Raises:
        OptionError: An option is out of range, or `masks` are not of one length and one per step.

    Source: Zheng et al., LEGO, 2024, arXiv:2310.06389, section 3.3.
    Differs: any brick but the first may be left out, and blocks of any stack; the released code
        leaves none out, so this follows the paper's rule.
    Exact when: no brick is left out; without the last bricks, the result is the last estimate.
    """

    name: ClassVar[str] = "skip-bricks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"steps": 2, "stages": "blocks"},)
    steps: int
    skip_ratio: float = 0.5
    when: str = "early"
    count: int = 1
    masks: tuple[str, ...] = ()
    stages: str = "bricks"

    def __post_init__(self) -> None:
        require_choice(self.name, "when", self.when, ("early", "late"))
        require_choice(self.name, "stages", self.stages, ("bricks", "blocks"))
        if self.steps < 1 or self.count < 1 or not 0 < self.skip_ratio <= 1:
            raise OptionError(
                f"{self.name}: steps={self.steps}, count={self.count} and"
                f" skip_ratio={self.skip_ratio} leave nothing out.",
                remedy="use 1 or more steps and bricks, and a ratio above 0 and at most 1.",
            )
        alike = len({len(mask) for mask in self.masks}) == 1
        flags = set("".join(self.masks)) <= {"0", "1"}
        if self.masks and not (len(self.masks) == self.steps and alike and flags):
            raise OptionError(
                f"{self.name}: masks={list(self.masks)[:4]} do not fit {self.steps} steps.",
                remedy='give one text per step, of one length, as in masks=["11", "10"].',
            )

    def prepared(self, program: Program) -> Program:
        return with_argument(program, STEP)

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def regions(self, program: Program) -> Iterator[Stages]:
        """Yield runs of stages that are computed on the same steps, if not on all."""
        step = [n for n in program.main.nodes if n.op == "placeholder" and n.name == STEP]
        for chain in self._chains(program):
            columns = [self.column(k, chain.length) for k in range(1, chain.length + 1)]
            for column, run in groupby(enumerate(columns, 1), key=itemgetter(1)):
                stages = [stage for stage, _ in run]
                if "0" in column:
                    yield chain.stages(stages[0], stages[-1], step)

    def column(self, stage: int, length: int) -> str:
        """Return `1` for each step that computes a stage, counted from 1, and `0` for the others.

        Raises:
            OptionError: `masks` are for a chain of another length.
        """
        if self.masks:
            if len(self.masks[0]) != length:
                raise OptionError(
                    f"{self.name}: a mask of {len(self.masks[0])} does not fit a chain of {length}."
                )
            return "".join(mask[stage - 1] for mask in self.masks)
        without = round(self.skip_ratio * self.steps) if stage > length - self.count else 0
        parts = "0" * without, "1" * (self.steps - without)
        return "".join(parts if self.when == "early" else parts[::-1])

    def decide(self, region: Stages) -> str | Skip:
        if not region.before:
            return Skip("has nothing to be left out for: the chain begins with it", at=region)
        several = [n for n in region.inputs if isinstance(n.meta["val"], tuple | list)]
        if several:
            return Skip(f"reads {several[0].name}, which is several values at once", at=region)
        return self.column(region.first, region.length)

    def replace(self, region: Stages, decision: str) -> nn.Module:
        before = [region.inputs.index(node) for node in region.before]
        return OnlyWhen(region, ActiveAt(decision), Bypass(before))

    def statistics(self, plan: Any) -> Mapping[str, int]:
        return {"stage calls left out": sum(c.count("0") for c in plan.decisions.values())}

    def _chains(self, program: Program) -> list[Chain]:
        if self.stages == "bricks":
            found = [estimates_of(program)]
        else:
            found = [blocks_of(stack) for stack in program.stacks()]
        return [chain for chain in found if chain is not None]


class ActiveAt(nn.Module):
    """Look up whether a step is one of those on which something is computed."""

    active: Bool[Tensor, " steps"]

    def __init__(self, column: str) -> None:
        super().__init__()
        self.register_buffer("active", torch.tensor([flag == "1" for flag in column]))

    def forward(self, *inputs: Int[Tensor, ""]) -> Bool[Tensor, ""]:
        flag: Tensor = torch.ops.aten.index.Tensor(self.active, [inputs[-1]])
        return flag
