"""What a pass will do, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from ..ir.errors import OptionError
from ..ir.plain import fit, plain
from ..ir.regions import Region

if TYPE_CHECKING:
    from .base import Pass

D = TypeVar("D")


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


def _decision(label: str, data: Any, method: type[Pass[Any, D]]) -> D:
    try:
        return fit(data, method.decision_type())
    except TypeError as error:
        raise OptionError(
            f"{method.name} cannot decide {str(data)[:80]!r}.",
            where=f"the plan for {label}",
            remedy="see `plan.json` of an engine made by the pass for what it decides.",
        ) from error
