"""A part of a model whose results come from earlier steps of a sampler wherever that is trusted.

    y = blocks(x)              computed, and kept
    y = forecast               on the other steps: of y itself, or of what the blocks add to x

Three choices make a cache: *which* part and which of the two values (`Span`, `Forecast`), *when* it
is trusted (`trust.Rule`), and *how* the value is forecast (`differences`). What is kept is state of
the program, the decision a branch in it. Step 0 begins a run: nothing from before is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn

from ...ir.arguments import with_argument
from ...ir.errors import OptionError
from ...ir.only_when import OnlyWhen
from ...ir.program import Program
from ...ir.regions import Region
from ...ir.state import State, shared, threaded, threads, with_state
from ..plan import Skip
from .differences import NEVER
from .step_modules import Forecast, Frame, Judge, Learn, Recall, Tick
from .trust import Rule, Schedule

STEP = "step"  # name of the argument that says which step it is, counted from 0
DTYPES: Mapping[str, torch.dtype | None] = {"float32": torch.float32, "model": None}
MOST_STEPS = 10_000  # of a run: a schedule is a table
FAULTS = (
    "the steps of a run come one after the other, from 0: this one is not the next.",
    "this session has been through all steps of a run.",
)


@dataclass(frozen=True)
class Span:
    """A part of a program that is computed on some steps only.

    Attributes:
        part: The part, without state.
        prefix: Begins the names of the state.
        how: How its results are made on steps without it.
        rule: When it is computed.
        probe: The value the rule looks at, and one before it; empty when it looks at none.
    """

    part: Region
    prefix: str
    how: Forecast
    rule: Rule
    probe: tuple[fx.Node, ...] = ()

    def states(self) -> list[State]:
        """Return what the cache keeps from call to call."""
        orders, whole = self.how.order + 1, torch.int64
        found = [
            self._state(f"value_{i}", (orders, *_shape(node)), self.how.dtype or _dtype(node))
            for i, node in enumerate(self.part.outputs)
        ]
        found.append(self._state("value_steps", (orders,), whole, NEVER))
        found.append(self._state("hits", (), whole))
        seen = (*self.probe, *self.part.outputs)[0]
        kept = self.rule.states(self.prefix, _shape(seen), self.how.dtype or _dtype(seen))
        return [*found, *(replace(state, instance=self.part.instance) for state in kept)]

    def objection(self) -> str | None:
        """Say why the part cannot be cached, completing "the part ..."."""
        before, after = self.part.inputs[: len(self.part.outputs)], self.part.outputs
        if any(isinstance(n.meta["val"], tuple | list) for n in self.part.inputs):
            return "reads something that is several values at once"
        if any(not isinstance(s, int) for n in (*after, *self.probe) for s in _shape(n)):
            return "has dynamic sizes, and state has fixed ones: capture without dynamic_shapes"
        if self.how.offset and list(map(_kind, before)) != list(map(_kind, after)):
            return "gives values of other shapes than it takes, so it adds nothing to them"
        return None

    def region(self, step: fx.Node | None = None) -> CachedSpan:
        """Return the part with what its cache reads and writes.

        Args:
            step: Node of its graph that says which step it is; None where there is no state.
        """
        names = [state.name for state in self.states()] if step is not None else []
        looked_at = {} if step is None else dict(
            zip(("step", "seen", "before"), (step, *self.probe), strict=False)
        )  # fmt: skip
        short = tuple(name.removeprefix(f"{self.prefix}.") for name in names)
        part = self.part
        found = CachedSpan(
            path=part.path, nodes=part.nodes, inputs=(*part.inputs, *looked_at.values()),
            outputs=part.outputs, graph=part.graph, instance=part.instance, program=part.program,
            span=self, named=(*looked_at, *short), written=short,
        )  # fmt: skip
        return threaded(found, names, names)

    def module(self, region: CachedSpan) -> nn.Module:
        """Return what stands in the place of the region."""
        rule, part = self.rule, self.part
        frame = Frame(
            len(part.inputs), len(part.outputs), region.named, rule.measures, region.written
        )
        recall, learn = Recall(frame, rule, self.how), Learn(frame, rule, self.how)
        return OnlyWhen(region, Judge(frame, rule), recall, learn)

    def _state(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, initial: float = 0
    ) -> State:
        return State(f"{self.prefix}.{name}", shape, dtype, initial, self.part.instance)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSpan(Region):
    """A part of a program with the state of its cache.

    Attributes:
        span: What it is.
        named: What the inputs behind those of the part are called: `step`, `seen`, `before`, state.
        written: State whose next values are the last outputs.
    """

    span: Span
    named: tuple[str, ...]
    written: tuple[str, ...]
    kind: ClassVar[str] = "block"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return nothing: a pass says which parts it caches."""
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock(Region):
    """The count of steps."""

    kind: ClassVar[str] = "step"

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return nothing: a pass that counts steps makes it."""
        return []


@dataclass(frozen=True)
class Steps:
    """How the steps of a run are counted.

    Attributes:
        prefix: Begins the names of the state.
        count: Steps of a run.
        told: Whether the caller says which step it is, by an argument; step 0 begins a run then.
    """

    prefix: str
    count: int
    told: bool

    def prepared(self, program: Program, spans: Sequence[Span]) -> Program:
        """Return the program with the state of caches, or as it is where they cannot be."""
        fit = [span for span in spans if span.objection() is None]
        if not fit:
            return program
        count = State(f"{self.prefix}.step", dtype=torch.int64)
        fault = State(f"{self.prefix}.fault", dtype=torch.int64, faults=FAULTS)
        new = with_state(program, [count, fault, *(s for span in fit for s in span.states())])
        new = with_argument(new, STEP) if self.told else new
        inside = [span.part.instance for span in fit if span.part.instance is not None]
        return shared(new, self._step(new).name, dict.fromkeys(inside))

    def regions(self, program: Program, spans: Sequence[Span]) -> Iterator[CachedSpan | Clock]:
        """Yield the regions of caches, then the count."""
        known = threads(program)
        names = (f"{self.prefix}.step", f"{self.prefix}.fault")
        step = self._step(program) if names[0] in known else None
        for span in spans:
            instance, here = span.part.instance, step
            if step is not None and instance is not None:
                reads = threads(program, instance).get(step.name)
                here = reads.current if reads else None
            yield span.region(here if span.objection() is None else None)
        if step is None or not spans:
            return
        expected = known[names[0]].current
        inputs = tuple(dict.fromkeys((expected, step)))
        written = tuple(node for name in names if (node := known[name].following) is not None)
        yield Clock(path=names[0], nodes=written, inputs=inputs, outputs=written, program=program)

    def decided(self, region: CachedSpan | Clock) -> str | Skip:
        """Return what becomes of a region: its schedule, or `gate`; of the count, who counts."""
        if isinstance(region, Clock):
            return "told" if self.told else "counted"
        objection, rule = region.span.objection(), region.span.rule
        if objection is not None:
            return Skip(objection, at=region)
        return rule.table if isinstance(rule, Schedule) else "gate"

    def replaced(
        self, region: CachedSpan | Clock, decision: str, kept: str | None = None
    ) -> nn.Module:
        """Return what stands in the place of a region.

        Args:
            region: One of `regions`.
            decision: As `decided` says.
            kept: Of a schedule, the steps that are kept; all that are computed when left out.
        """
        if isinstance(region, Clock):
            return Tick(self.count, told=decision == "told")
        span = region.span
        rule = span.rule if decision == "gate" else Schedule(decision, kept)
        return replace(span, rule=rule).module(region)

    def _step(self, program: Program) -> fx.Node:
        """Return the node of main that says which step it is."""
        if not self.told:
            return threads(program)[f"{self.prefix}.step"].current
        return next(n for n in program.main.nodes if n.op == "placeholder" and n.name == STEP)


def require_within(
    owner: str, option: str, value: float, least: float, most: float = math.inf
) -> None:
    """Refuse a number outside its range.

    Raises:
        OptionError: It is outside, or not a number.
    """
    if not least <= value <= most:
        to = "" if most == math.inf else f" to {most:,}"
        raise OptionError(
            f"{owner}: {option}={value} is out of range.",
            remedy=f"use {least}{to or ' or more'}.",
        )


def _kind(node: fx.Node) -> tuple[Any, ...]:
    return _shape(node), _dtype(node)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
