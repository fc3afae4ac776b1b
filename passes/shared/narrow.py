"""Choose the units that a narrower region keeps: what pruning heads and neurons has in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ...ir.errors import OptionError
from ...ir.recognize.coupled import Coupled
from ...ir.regions import R
from ..base import Calibration, Evidence, count_of
from ..plan import Plan, Skip
from .importance import METHODS, importance

CALIBRATED = ("taylor", "activation")  # what is scored on inputs


def check_narrowing(
    owner: str, by: str, keep: int | None, keep_ratio: float, multiple_of: int
) -> None:
    """Refuse options of narrowing that can be met by no model.

    Raises:
        OptionError: One of them is out of range.
    """
    if by not in METHODS:
        raise OptionError(
            f"{owner}: importance={by} is not supported; use one of {', '.join(METHODS)}."
        )
    if keep is not None and keep < 1:
        raise OptionError(f"{owner}: keep={keep} keeps nothing; use 1 or more.")
    if not 0 < keep_ratio <= 1:
        raise OptionError(
            f"{owner}: keep_ratio={keep_ratio} is no fraction to keep; use more than 0, at most 1."
        )
    if multiple_of < 1:
        raise OptionError(f"{owner}: multiple_of={multiple_of} divides nothing; use 1 or more.")


def evidence_of(
    by: str, coupled: Iterable[Coupled], calibration: Calibration, seed: int
) -> Evidence | None:
    """Return scores of units on calibration inputs; None where weights alone are scored."""
    if by not in CALIBRATED:
        return None
    wanted = [c for c in coupled if c.objection is None]
    return Evidence(count_of(calibration), importance(wanted, by, calibration, seed=seed))


def scored(by: str, coupled: Coupled, seed: int, owner: str) -> Tensor:
    """Return the scores of one region by its weights alone.

    Raises:
        OptionError: They are taken from calibration inputs, which must be seen first.
    """
    if by in CALIBRATED:
        raise OptionError(
            f"{owner}: importance={by} is measured on calibration inputs.",
            remedy="run the pass with calibration=..., so that they are measured first.",
        )
    return importance([coupled], by, seed=seed)[coupled.region.label]


def plan_each(
    found: Iterable[R],
    decide: Callable[[R, Tensor | None], list[int] | Skip],
    scores: Evidence | None,
) -> Plan[list[int]]:
    """Decide for every region, with its scores where there are any."""
    known: Mapping[str, Tensor] = scores.regions if scores else {}
    decisions: dict[str, list[int]] = {}
    skips: dict[str, str] = {}
    for region in found:
        decision = decide(region, known.get(region.label))
        if isinstance(decision, Skip):
            skips[decision.at.label] = decision.reason
        else:
            decisions[region.label] = decision
    return Plan(decisions, skips)


def strongest(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the units with the highest scores, in model order.

    Args:
        scores: One per unit.
        count: How many to keep, a multiple of `groups`.
        groups: Runs of units of which each keeps as many.
    """
    apart = scores.unflatten(0, (groups, -1))
    best = apart.topk(count // groups, dim=1).indices.sort(dim=1).values
    size = apart.shape[1]
    return [group * size + unit for group, units in enumerate(best.tolist()) for unit in units]
