"""What a pass is: decide, then cut.

    measure -> plan -> rewrite -> calibrate -> recover -> certify

A method fills in `decide` (which regions, how) and `replace` (what stands there instead); a method
with a global budget or a need of calibration overrides `plan`, one that calibrates `measure`, one
whose new weights follow from calibration in closed form `calibrate`, one that trains `recovery`.
The framework finds regions, traces, splices, trains, verifies, and writes receipt and certificate.

What a pass needs of the graph, ends and establishes are *facts*, a closed vocabulary in `ir.facts`:
weights are dense, each idea is one op, calibration is still valid, feed-forward networks are plain
or gated, blocks have weights of their own. Whole recipes are checked against them before a weight
is touched, and ordered by them on request.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.plain import plain
from ..ir.program import Program
from ..ir.regions import Region, regions
from .plan import Plan, Skip
from .shared.calibration import Calibration, Judged, count_of, judged
from .shared.recovery import Stage

R = TypeVar("R", bound=Region)
D = TypeVar("D")

__all__ = ["Calibration", "Evidence", "Judged", "Pass", "Plan", "Promise", "Skip", "count_of",
           "judged", "require_choice", "selected"]  # fmt: skip


class Promise(StrEnum):
    """What a pass claims about the numbers of the new program."""

    EXACT = "exact"
    BOUNDED = "bounded"
    APPROXIMATE = "approximate"
    BEHAVIOUR_CHANGING = "behaviour-changing"


@dataclass(frozen=True)
class Evidence:
    """What calibration showed of a program.

    Attributes:
        samples: Input sets looked at.
        regions: Statistics by region label: numbers, lists, and tensors whose size does not grow
            with the number of samples.
    """

    samples: int
    regions: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pass(ABC, Generic[R, D]):
    """A published method as a graph transformation. Subclasses are frozen dataclasses of options.

    Class attributes: `name` as in recipes; `promise`; `requires`, the facts of the graph the method
    needs; `verbs`, what it does with the thing a fact is about, where it can say so better than the
    fact: `{Fact.DENSE_WEIGHTS: "must split"}`; `examples`, options under which the method makes
    something else of the graph, one mapping each, by which its composition with others is tested.

    Attributes:
        allow_no_match: Accept that nothing in the model matches; by default that is an error.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    verbs: ClassVar[Mapping[Fact, str]] = {}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    allow_no_match: bool = False

    @abstractmethod
    def decide(self, region: R) -> D | Skip:
        """Choose what to do with one region, or decline."""

    @abstractmethod
    def replace(self, region: R, decision: D) -> nn.Module:
        """Return what stands in the region's place: its inputs in, its outputs out."""

    def bound(self, region: R, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the largest difference from the region's output that the method allows.

        Args:
            region: A replaced region.
            module: What stands in its place.
            x: The region's first input.

        Returns:
            A tensor that broadcasts to the output; None when no bound is known.
        """
        return None

    def promised(self) -> Promise:
        """Return what the pass claims with these options: `promise`, or less."""
        return self.promise

    def calibrates(self) -> bool:
        """Say whether anything the pass does with these options depends on calibration."""
        hooks = ("measure", "calibrate", "recovery")
        return any(getattr(type(self), hook) is not getattr(Pass, hook) for hook in hooks)

    def ends(self) -> frozenset[Fact]:
        """Return the facts that no longer hold anywhere after this pass."""
        return frozenset()

    def establishes(self) -> frozenset[Fact]:
        """Return the facts that hold everywhere after this pass."""
        return frozenset()

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        """Run calibration inputs through the program and gather statistics.

        Args:
            program: What the pass will be planned on.
            calibration: Flat inputs; look at one set at a time and keep sums, not values.

        Returns:
            What `plan` is given; None when the method needs no calibration.
        """
        return None

    def calibrate(
        self, old: Program, new: Program, plan: Plan[D], calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """Return weights of the new program that follow from calibration in closed form.

        Args:
            old: The program the plan was made for.
            new: What the rewrite made of it.
            plan: What was carried out.
            calibration: As in `measure`.

        Returns:
            Tensors by their name in the new program, of the shapes and types they have there.
        """
        return {}

    def recovery(self, old: Program, new: Program, plan: Plan[D]) -> Sequence[Stage]:
        """Say which weights of the new program are trained, one stage after the other.

        Args:
            old: The teacher: the program the plan was made for.
            new: The student: what the rewrite made of it.
            plan: What was carried out.
        """
        return ()

    def prepared(self, program: Program) -> Program:
        """Return the program with what replacements read besides their regions: new arguments."""
        return program

    def rounds(self, program: Program) -> int:
        """Say how often the pass measures, plans, rewrites and recovers; once by default.

        Each round is planned on what the one before has left.
        """
        return 1

    def part(self, plan: Plan[D], number: int) -> Plan[D]:
        """Return the decisions of a plan that are carried out in a round, counted from 0."""
        return plan

    def check(self, old: Program, new: Program, inputs: Sequence[Tensor]) -> None:
        """Check what equal outputs of one call do not show, as of calls that follow each other.

        Args:
            old: The program before the pass.
            new: The program after it.
            inputs: Flat inputs of `old`.

        Raises:
            VerifyError: The new program is not what the pass promises.
        """

    def predict(self, region: R, decision: D) -> Mapping[str, int]:
        """Say what a decision will change, before it is carried out.

        Returns:
            Change of `parameters`, `weight_bytes`, `flops`, ... (attributes of `ir.cost.Cost`);
            what is left out is predicted from the new graph. Measured when the pass has run.
        """
        return {}

    def statistics(self, plan: Plan[D]) -> Mapping[str, int]:
        """Return counters of interest, as in `{"experts": 16}`, for receipt and `--statistics`."""
        return {}

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[D]:
        """Decide for every region, in execution order. Pure: equal arguments give equal plans.

        Args:
            program: What to plan for; its weights may be on the meta device.
            evidence: What `measure` found.
        """
        decisions: dict[str, D] = {}
        skips: dict[str, str] = {}
        for region in self.regions(program):
            decision = self.decide(region)
            if isinstance(decision, Skip):
                skips[decision.at.label] = decision.reason
            else:
                decisions[region.label] = decision
        return Plan(decisions, skips)

    def regions(self, program: Program) -> Iterator[R]:
        """Yield the regions this pass looks at."""
        return regions(program, *self.region_kinds())

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain data."""
        return {
            f.name: plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        }

    @classmethod
    def region_kinds(cls) -> tuple[type[R], ...]:
        """Return the kinds of region named in `Pass[Region, Decision]`."""
        kind, _ = cls._arguments()
        return typing.get_args(kind) or (kind,)

    @classmethod
    def decision_type(cls) -> Any:
        """Return the type of decision named in `Pass[Region, Decision]`."""
        return cls._arguments()[1]

    @classmethod
    def _arguments(cls) -> tuple[Any, ...]:
        for owner in cls.__mro__:
            for base in vars(owner).get("__orig_bases__", ()):
                if typing.get_origin(base) is Pass:
                    return typing.get_args(base)
        raise TypeError(f"{cls.__name__} does not say which regions it looks at: Pass[Region, D]")

    def __str__(self) -> str:
        """Render as in a recipe: `drop-blocks{keep_ratio=0.75}`."""
        options = ", ".join(f"{name}={_text(value)}" for name, value in self.options().items())
        return f"{self.name}{{{options}}}" if options else self.name


def selected(label: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Say whether a module path matches one of `include` and none of `exclude` (glob patterns)."""
    from fnmatch import fnmatchcase

    return any(fnmatchcase(label, pattern) for pattern in include) and not any(
        fnmatchcase(label, pattern) for pattern in exclude
    )


def require_choice(owner: str, option: str, value: object, choices: Sequence[object]) -> None:
    """Refuse an option outside its choices.

    Raises:
        OptionError: It is not one of them.
    """
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise OptionError(f"{owner}: {option}={value} is not supported; use one of {listed}.")


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(value) if isinstance(value, str) else str(value)
