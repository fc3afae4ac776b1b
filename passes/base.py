"""What a pass is: decide, then cut.

    measure -> plan -> rewrite -> certify

A method fills in `decide` (which regions, how) and `replace` (what stands there instead); a method
with a global budget overrides `plan`. The framework finds regions, traces and splices, verifies,
and writes receipt and certificate.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.program import Program
from ..ir.regions import Region, regions

R = TypeVar("R", bound=Region)
D = TypeVar("D")


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
        """Return plain data."""
        plain = {label: _plain(decision) for label, decision in self.decisions.items()}
        return {"decisions": plain, "skips": dict(self.skips)}


@dataclass(frozen=True, kw_only=True)
class Pass(ABC, Generic[R, D]):
    """A published method as a graph transformation. Subclasses are frozen dataclasses of options.

    Class attributes: `name` as in recipes; `promise`; `requires`, the facts of the graph the
    method needs, as in "weights are dense".

    Attributes:
        allow_no_match: Accept that nothing in the model matches; by default that is an error.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    requires: ClassVar[frozenset[str]] = frozenset()

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

    def ends(self) -> frozenset[str]:
        """Return the facts that no longer hold anywhere after this pass."""
        return frozenset()

    def plan(self, program: Program) -> Plan[D]:
        """Decide for every region, in execution order."""
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
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        }

    @classmethod
    def region_kinds(cls) -> tuple[type[R], ...]:
        """Return the kinds of region named in `Pass[Region, Decision]`."""
        for owner in cls.__mro__:
            for base in vars(owner).get("__orig_bases__", ()):
                if typing.get_origin(base) is Pass:
                    kind, _ = typing.get_args(base)
                    return typing.get_args(kind) or (kind,)
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


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(value) if isinstance(value, str) else str(value)
