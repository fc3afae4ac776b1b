"""Certify a whole recipe: the model against what all passes together made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.program import Program
from .account import COUNTED, Count, settle, sizes_of
from .certify import Certificate, certify, observe, refer
from .numerics import Inputs, Verdict
from .steps import Step


@dataclass(frozen=True)
class Whole:
    """Two programs compared.

    Attributes:
        certificate: What was measured.
        verdicts: What rounding explains, by output.
    """

    certificate: Certificate
    verdicts: Mapping[str, Verdict]


def certify_whole(
    old: Program, new: Program, steps: Sequence[Step], inputs: Sequence[Inputs]
) -> Certificate | None:
    """Return the certificate of a recipe; None without inputs or passes.

    A single pass is the whole recipe, and has been certified already.
    """
    if not inputs or not steps:
        return None
    if len(steps) == 1 and steps[0].certificate:
        return steps[0].certificate
    return measure(old, new, inputs).certificate


def measure(old: Program, new: Program, inputs: Sequence[Inputs]) -> Whole:
    """Compare two programs on inputs: three ways, per block, and what they cost.

    Raises:
        VerifyError: The new program does not have the parameters or bytes its graph says.
    """
    before, after = observe(old, inputs), observe(new, inputs)
    exact = refer(old, inputs, before, after)
    certificate, verdicts = certify(
        old, before, after, exact, None, _costs(new, after.counts, inputs[0])
    )
    return Whole(certificate, verdicts)


def _costs(new: Program, measured: Mapping[str, int], inputs: Inputs) -> dict[str, Count]:
    cost = new.cost(sizes_of(new, inputs))
    return settle("the recipe", {name: getattr(cost, name) for name in COUNTED}, measured)
