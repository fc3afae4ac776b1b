"""What a pass is: decide, then cut.

    measure -> plan -> rewrite -> recover -> certify

A method fills in `decide` (which regions, how) and `replace` (what stands there instead); a method
with a global budget or a need of calibration overrides `plan`, one that calibrates `measure`, one
that trains `recover`. The framework finds regions, traces and splices, verifies, and writes receipt
and certificate.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.plain import fit, plain
from ..ir.program import Program
from ..ir.regions import Region, regions

R = TypeVar("R", bound=Region)
D = TypeVar("D")
Calibration = Iterable[Sequence[Tensor]]  # flat inputs of `main`, as often as one asks


class Promise(StrEnum):
    """What a pass claims about the numbers of the new program."""

    EXACT = "exact"
    BOUNDED = "bounded"
    APPROXIMATE = "approximate"
    BEHAVIOUR_CHANGING = "behaviour-changing"


@dataclass(frozen=True)
class Skip:
    """Why a pass leaves a region alone.

    Attributes:
        reason: Completes the sentence "the region ...", as in "has 3 neurons, 4 would be kept".
        at: The region.
    """

    reason: str
    at: Region


@dataclass(frozen=True)
class Plan(Generic[D]):
    """What a pass will do: plain data that prints, saves and can be replayed.

    Attributes:
        decisions: Decision by region label.
        skips: Reason by region label.
    """

    decisions: Mapping[str, D]
    skips: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, to be saved, edited and read back."""
        return {"decisions": plain(self.decisions), "skips": dict(self.skips)}

    @classmethod
    def from_json(cls, data: Any, method: type[Pass[Any, D]]) -> Self:
        """Return the plan that plain data stands for.

        Args:
            data: As from `to_json`; `skips` may be missing.
            method: The pass that is to carry it out.

        Raises:
            OptionError: The data is no plan, or not one of this pass.
        """
        try:
            known = isinstance(data, Mapping) and data.keys() <= {"decisions", "skips"}
            decisions = fit(data["decisions"], dict[str, Any]) if known else None
            skips = fit(data.get("skips", {}), dict[str, str])
        except (AttributeError, KeyError, TypeError):
            decisions = None
        if decisions is None:
            raise OptionError(
                f"this is no plan of {method.name}.",
                remedy='give {"decisions": {region: decision}} as a plan.json holds it.',
            )
        return cls({label: _decision(label, d, method) for label, d in decisions.items()}, skips)


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

    def recover(
        self, old: Program, new: Program, plan: Plan[D], calibration: Calibration
    ) -> Program:
        """Return the new program with better weights, the old one as teacher.

        Graphs stay as they are, and tensors that both programs hold are not written into.
        """
        return new

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


def _decision(label: str, data: Any, method: type[Pass[Any, D]]) -> D:
    try:
        return fit(data, method.decision_type())
    except TypeError as error:
        raise OptionError(
            f"{method.name} cannot decide {str(data)[:80]!r}.",
            where=f"the plan for {label}",
            remedy="see `plan.json` of an engine made by the pass for what it decides.",
        ) from error


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(value) if isinstance(value, str) else str(value)
