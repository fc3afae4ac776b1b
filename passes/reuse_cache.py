"""Take what the blocks give from the last step of a sampler that computed it.

    interval      computes each so many-th step
    first-block   computes when what the first block adds has changed by a threshold since then
    input         computes when the changes of the input of the blocks have added up to a threshold

The plain caches that others are measured against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..ir.program import Program
from ..ir.recognize.chain import Chain
from ..ir.recognize.line import line_of, read_part
from .base import Pass, Promise, Skip, require_choice
from .shared.step_cache import DTYPES, MOST_STEPS, CachedSpan, Clock, Span, Steps, require_within
from .shared.step_modules import Forecast
from .shared.trust import Gate, GateOptions, Rule, Schedule, interval

PREFIX = "reuse_cache"


@dataclass(frozen=True, kw_only=True)
class ReuseCache(Pass[CachedSpan | Clock, str]):
    """Reuse what the blocks gave, or added, on an earlier step of a sampler.

    Attributes:
        steps: Steps of a run of the sampler, one call each. `session.reset()` begins a run.
        when: `interval`; `first-block`, whose offset is compared with that of the last computed
            step; or `input`, the changes of which from step to step are added up.
        threshold: Relative change from which on a step is computed: mean of the differences by
            mean of the values. Not comparable between models.
        every: Compute each so many-th step; with an interval.
        warmup: Steps behind the first that are always computed; with a threshold.
        force_last: Compute the last step of a run; with a threshold.
        max_skips: Steps in a row that may be left out; 0 for no limit; with a threshold.
        coefficients: Polynomial that changes of the input go through, its highest power first.
        reduce: Change of a batch: `mean` over everything, or `max`, that of the worst sample.
        value: What is reused: the `offset` the blocks add to their input, or their `output`.
        dtype: Store it in `float32`, or in the `model`'s own type.
        counted: Count steps by calls since the last reset; otherwise the program gets an argument
            `step`, from 0, and step 0 begins a run.

    Raises:
        OptionError: An option is out of range.

    Source: Selvaraju et al., FORA, 2024, arXiv:2407.01425 (interval); ParaAttention,
        github.com/chengzeyi/ParaAttention (first block); Liu et al., TeaCache, 2024,
        arXiv:2411.19108 (input).
    Differs: FORA stores the outputs of attentions and networks, this what all blocks give together;
        TeaCache looks at the first block's modulated input, this at the input itself.
    Exact when: `every` is 1, or `threshold` is 0.
    """

    name: ClassVar[str] = "reuse-cache"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"steps": 4},)
    steps: int
    when: str = "interval"
    threshold: float = 0.08
    every: int = 2
    warmup: int = 0
    force_last: bool = False
    max_skips: int = 0
    coefficients: tuple[float, ...] = ()
    reduce: str = "mean"
    value: str = "offset"
    dtype: str = "model"
    counted: bool = True

    def __post_init__(self) -> None:
        require_choice(self.name, "when", self.when, ("interval", "first-block", "input"))
        require_choice(self.name, "reduce", self.reduce, ("mean", "max"))
        require_choice(self.name, "value", self.value, ("offset", "output"))
        require_choice(self.name, "dtype", self.dtype, tuple(DTYPES))
        require_within(self.name, "steps", self.steps, 1, MOST_STEPS)
        require_within(self.name, "every", self.every, 1)
        for option in ("threshold", "warmup", "max_skips"):
            require_within(self.name, option, getattr(self, option), 0)

    def prepared(self, program: Program) -> Program:
        return self._clock().prepared(program, self._spans(program))

    def regions(self, program: Program) -> Iterator[CachedSpan | Clock]:
        return self._clock().regions(program, self._spans(program))

    def decide(self, region: CachedSpan | Clock) -> str | Skip:
        return self._clock().decided(region)

    def replace(self, region: CachedSpan | Clock, decision: str) -> nn.Module:
        return self._clock().replaced(region, decision)

    def _clock(self) -> Steps:
        return Steps(PREFIX, self.steps, told=not self.counted)

    def _spans(self, program: Program) -> list[Span]:
        """Return the blocks that are left out, if the program has any."""
        line = line_of(program)
        before = 1 if self.when == "first-block" else 0
        if line is None or line.length <= before:
            return []
        offset = self.value == "offset"
        if not offset:
            *values, last = line.values
            line = Chain((*values, tuple(map(read_part, last))), line.label, program)
        how = Forecast(offset=offset, dtype=DTYPES[self.dtype])
        probe = {
            "interval": (),
            "first-block": (line.values[before][0], line.values[0][0]),
            "input": (line.values[0][0],),
        }[self.when]
        return [Span(line.stages(before + 1, line.length), PREFIX, how, self._rule(), probe)]

    def _rule(self) -> Rule:
        if self.when == "interval":
            return Schedule(interval(self.steps, 1, self.every))
        follows = self.when == "input"
        return Gate(
            GateOptions(
                threshold=self.threshold,
                steps=self.steps,
                warmup=self.warmup,
                last=self.force_last,
                streak=self.max_skips,
                refresh=follows,
                accumulate=follows,
                coefficients=self.coefficients if follows else (),
                offset=not follows,
                against="guess",
                reduce=self.reduce,
            )
        )
