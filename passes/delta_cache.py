"""Leave blocks out on some steps of a sampler, and add what they added on the last full step.

    blocks(x) ~ x + offset         offset = blocks(x') - x', with x' of the last full step

Early, when noise becomes an outline, the rear blocks are left out; late, when details are drawn,
the front ones. The result still depends on the x of this step, which a stored result would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar

from torch import nn

from ..ir.program import Program
from ..ir.recognize.line import line_of
from .base import Pass, Promise, Skip, require_choice
from .shared.step_cache import DTYPES, MOST_STEPS, CachedSpan, Clock, Span, Steps, require_within
from .shared.step_modules import Forecast
from .shared.trust import Schedule, interval

PREFIX = "delta_cache"
STAGES: Mapping[str, tuple[str, str]] = {
    "rear-front": ("rear", "front"), "front-rear": ("front", "rear"),
    "rear": ("rear", "rear"), "front": ("front", "front"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeltaCache(Pass[CachedSpan | Clock, str]):
    """Reuse what blocks add on steps between full ones: rear blocks early, front blocks late.

    Attributes:
        steps: Steps of a run of the sampler, one call each. `session.reset()` begins a run.
        count: Blocks left out on the steps between.
        every: Compute each so many-th step in full, beginning with the first.
        boundary: How many steps at the beginning of a run, those of much noise, are early; 3 of 5
            when left out.
        stages: Which blocks are left out early and late: `rear-front`, `front-rear`, or the same
            throughout, `rear` or `front`.
        value: What is stored: the `offset` the blocks add, or their `output`.
        dtype: Store it in `float32`, or in the `model`'s own type.
        counted: Count steps by calls since the last reset; otherwise the program gets an argument
            `step`, from 0, and step 0 begins a run.

    Raises:
        OptionError: An option is out of range.

    Source: Chen et al., Delta-DiT, 2024, arXiv:2406.01125, section 4.
    Differs: no code was released, so the steps follow the paper's description; both offsets are
        stored, where one would do; blocks that are in both parts have an offset of their own.
    Exact when: `every` is 1, or on every full step.
    """

    name: ClassVar[str] = "delta-cache"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"steps": 4, "count": 1},)
    steps: int
    count: int
    every: int = 2
    boundary: int | None = None
    stages: str = "rear-front"
    value: str = "offset"
    dtype: str = "model"
    counted: bool = True

    def __post_init__(self) -> None:
        require_choice(self.name, "stages", self.stages, tuple(STAGES))
        require_choice(self.name, "value", self.value, ("offset", "output"))
        require_choice(self.name, "dtype", self.dtype, tuple(DTYPES))
        require_within(self.name, "steps", self.steps, 1, MOST_STEPS)
        require_within(self.name, "boundary", self._early(), 0, self.steps)
        for option in ("count", "every"):
            require_within(self.name, option, getattr(self, option), 1)

    def prepared(self, program: Program) -> Program:
        return self._clock().prepared(program, self._spans(program))

    def regions(self, program: Program) -> Iterator[CachedSpan | Clock]:
        return self._clock().regions(program, self._spans(program))

    def decide(self, region: CachedSpan | Clock) -> str | Skip:
        return self._clock().decided(region)

    def replace(self, region: CachedSpan | Clock, decision: str) -> nn.Module:
        return self._clock().replaced(region, decision, self._full())

    def column(self, block: int, depth: int) -> str:
        """Return `1` for each step that computes a block, counted from 1, `0` for the others."""
        out = {"rear": block > depth - self.count, "front": block <= self.count}
        early, late = (out[stage] for stage in STAGES[self.stages])
        left_out = [early if step < self._early() else late for step in range(self.steps)]
        return "".join(
            "1" if full == "1" or not without else "0"
            for full, without in zip(self._full(), left_out, strict=True)
        )

    def _early(self) -> int:
        return round(0.6 * self.steps) if self.boundary is None else self.boundary

    def _full(self) -> str:
        return interval(self.steps, 1, self.every)

    def _clock(self) -> Steps:
        return Steps(PREFIX, self.steps, told=not self.counted)

    def _spans(self, program: Program) -> list[Span]:
        """Return the runs of blocks that are left out on the same steps, if any."""
        line = line_of(program)
        if line is None:
            return []
        how = Forecast(offset=self.value == "offset", dtype=DTYPES[self.dtype])
        columns = [(k, self.column(k, line.length)) for k in range(1, line.length + 1)]
        spans: list[Span] = []
        for column, run in groupby(columns, key=itemgetter(1)):
            blocks = [block for block, _ in run]
            if "0" in column:
                first, last = blocks[0], blocks[-1]
                rule = Schedule(column, self._full())
                prefix = f"{PREFIX}.{first}_to_{last}"
                spans.append(Span(line.stages(first, last), prefix, how, rule))
        return spans
