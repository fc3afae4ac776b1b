"""Extrapolate what the blocks give from earlier steps of a sampler, instead of computing it.

    h_L(k) ~ sum_i D_i (k - k0)^i / i!          D: differences of h_L at the steps computed before

With a gate, the first block is always computed, and says whether the step can be foreseen: if the
same forecast meets its output, the blocks behind it are left out. With an interval the steps are
fixed, and all blocks are left out. Decision and cache are in the program, so engines skip by
themselves: a session holds the cache of one sampler run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from ..ir.errors import OptionError
from ..ir.program import Program
from ..ir.recognize.chain import Chain
from ..ir.recognize.line import line_of, read_part
from ..ir.recognize.place import Place
from ..ir.shapes import describe
from ..ir.taps import is_always_computed
from .base import Pass, Promise, Skip, require_choice
from .shared.apart import apart
from .shared.differences import BASES
from .shared.step_cache import DTYPES, MOST_STEPS, CachedSpan, Clock, Span, Steps, require_within
from .shared.step_modules import Forecast
from .shared.trust import Gate, GateOptions, Rule, Schedule, interval

PREFIX = "taylor_cache"
ORDERS = 8  # differences of higher order are all noise


@dataclass(frozen=True, kw_only=True)
class TaylorCache(Pass[CachedSpan | Clock, str]):
    """Extrapolate the output of the last block over the steps of a sampler.

    Attributes:
        steps: Steps of a run of the sampler, one call each. `session.reset()` begins a run.
        what: What is forecast: the output of the `stack` of blocks; or those of its `modules`,
            attentions and feed-forward networks before their gates, which stay those of the step.
        when: `gate` computes the steps that a forecast of the first block misses; `interval` those
            of a fixed rhythm; `mask` those of `mask`.
        threshold: Steps on which the first block is foreseen with a smaller relative error (mean of
            the differences by mean of the values) are left out. Not comparable between models.
        order: Highest difference in the forecast of the last block.
        probe_order: Highest difference in the forecast of the first block.
        probe_depth: Blocks that are always computed; the last of them is the one foreseen.
        warmup: Steps behind the first that are computed before the gate is asked.
        force_last: Compute the last step of a run; with a gate.
        max_skips: Steps in a row that may be left out; 0 for no limit; with a gate.
        refresh: Let the forecast of the first block follow it on all steps, not only on those that
            were computed.
        reduce: Error of a batch: `mean` over everything, or `max`, that of the worst sample.
        first: Steps at the beginning that are computed; with an interval.
        every: Of the steps after them, compute each so many-th; with an interval.
        mask: `1` for each step that is computed and `0` for the others, beginning with `1`.
        basis: `taylor`, or `newton`, whose forecast goes through the values it is made of.
        dtype: Keep differences in `float32`, or in the `model`'s own type.
        counted: Count steps by calls since the last reset; otherwise the program gets an argument
            `step`, from 0, and step 0 begins a run.

    Raises:
        OptionError: An option is out of range, or `mask` does not fit the steps.

    Source: Guan et al., CG-Taylor, 2025, arXiv:2508.02240 (gate); Liu et al., TaylorSeer, 2025,
        arXiv:2503.06923 (forecast, interval).
    Differs: an interval goes with the stack's output, too; of a joint stream the part that is read
        is kept, the image; `max_skips`, `refresh`, `reduce` and `newton` are not in the papers.
    Exact when: `threshold` is 0, or `every` is 1.
    """

    name: ClassVar[str] = "taylor-cache"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"steps": 4},)
    steps: int
    what: str = "stack"
    when: str = "gate"
    threshold: float = 0.05
    order: int = 1
    probe_order: int = 3
    probe_depth: int = 1
    warmup: int = 2
    force_last: bool = True
    max_skips: int = 0
    refresh: bool = False
    reduce: str = "mean"
    first: int = 2
    every: int = 4
    mask: str = ""
    basis: str = "taylor"
    dtype: str = "float32"
    counted: bool = True

    def __post_init__(self) -> None:
        require_choice(self.name, "what", self.what, ("stack", "modules"))
        schedules = ("interval", "mask")
        whens = ("gate", *schedules) if self.what == "stack" else schedules
        require_choice(self.name, f"when (with what={self.what})", self.when, whens)
        require_choice(self.name, "reduce", self.reduce, ("mean", "max"))
        require_choice(self.name, "basis", self.basis, BASES)
        require_choice(self.name, "dtype", self.dtype, tuple(DTYPES))
        for option in ("order", "probe_order"):
            require_within(self.name, option, getattr(self, option), 0, ORDERS)
        for option in ("warmup", "max_skips", "threshold"):
            require_within(self.name, option, getattr(self, option), 0)
        for option in ("probe_depth", "first", "every"):
            require_within(self.name, option, getattr(self, option), 1)
        require_within(self.name, "steps", self.steps, 1, MOST_STEPS)
        if self.when == "mask" and not (
            len(self.mask) == self.steps and set(self.mask) <= {"0", "1"} and self.mask[0] == "1"
        ):
            raise OptionError(
                f"{self.name}: mask={self.mask!r} does not fit {self.steps} steps.",
                remedy='give 1 or 0 for each step, the first one 1, as in mask="1101".',
            )

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
        """Return the parts that are left out, if the program has any."""
        if self.what == "modules":
            return self._modules(program)
        line = line_of(program)
        before = self.probe_depth if self.when == "gate" else 0
        if line is None or line.length <= before:
            return []
        *values, last = line.values
        chain = Chain((*values, tuple(map(read_part, last))), line.label, program)
        probe = (_like(chain.values[before], chain.values[-1][0]),) if before else ()
        part = chain.stages(before + 1, chain.length)
        return [Span(part, PREFIX, self._how(), self._rule(), probe)]

    def _modules(self, program: Program) -> list[Span]:
        """Return the sublayers of all blocks that are always called."""
        how, rule = self._how(), self._rule()
        blocks = (block for stack in program.stacks() for block in stack.blocks)
        called = (b for b in blocks if is_always_computed(program, Place(b.instance, b.nodes[0])))
        parts = [part for block in called for part in apart([s.region for s in block.sublayers])]
        return [Span(part, f"{PREFIX}.{part.path}", how, rule) for part in parts]

    def _how(self) -> Forecast:
        return Forecast(order=self.order, basis=self.basis, dtype=DTYPES[self.dtype])

    def _rule(self) -> Rule:
        if self.when != "gate":
            return Schedule(self._table())
        return Gate(
            GateOptions(
                threshold=self.threshold,
                steps=self.steps,
                order=self.probe_order,
                basis=self.basis,
                warmup=self.warmup,
                last=self.force_last,
                streak=self.max_skips,
                refresh=self.refresh,
                reduce=self.reduce,
            )
        )

    def _table(self) -> str:
        return self.mask if self.when == "mask" else interval(self.steps, self.first, self.every)


def _like(streams: tuple[fx.Node, ...], other: fx.Node) -> fx.Node:
    """Return the first stream of another's shape, or the first: of image and text, the image."""
    shape = describe(other.meta["val"])
    return next((n for n in streams if describe(n.meta["val"]) == shape), streams[0])
