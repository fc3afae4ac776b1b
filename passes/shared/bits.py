"""Which layers get more bits than others, when all together have so many.

error of a layer at some bits  =  change of the outputs, it alone rounded   (measured once)
                                  * |W - W'|^2 there / |W - W'|^2 where measured
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.regions import Region
from ...ir.run import run
from ..base import Calibration
from .codes import Codes, Grid, rounded

SETS = 4  # calibration sets that sensitivity is measured on


FORMS: Final = ((4, None), (4, 128), (4, 64), (4, 32), (4, 16), (8, None))
"""Bits and group sizes, the coarsest first; None for all inputs of a layer."""


@dataclass(frozen=True)
class Form:
    """A way to store a weight.

    Attributes:
        codes: How; None leaves the weight as it is.
        size_bytes: Of codes, scales and zero points.
        error: What it is expected to change of the outputs.
    """

    codes: Codes | None
    size_bytes: int
    error: float


@dataclass(frozen=True)
class Measured:
    """A weight, and what its coarsest form was measured to change of the outputs.

    Attributes:
        weight: [*experts, out_features, in_features].
        sensitivity: As in `sensitivities`.
        scale_bytes: Bytes of a scale.
    """

    weight: Tensor
    sensitivity: float
    scale_bytes: int


def within_budget(
    weights: Mapping[str, Measured], budget_bits: float, symmetric: bool
) -> dict[str, Codes | None]:
    """Return how to store weights that may take so many bits on average; None leaves one as it is.

    Raises:
        OptionError: No form is as small.
    """
    forms = {label: forms_of(measured, symmetric) for label, measured in weights.items()}
    count = sum(measured.weight.numel() for measured in weights.values())
    chosen = shared_out(forms, budget_bits * count / 8)
    return {label: form.codes for label, form in chosen.items()}


def forms_of(measured: Measured, symmetric: bool) -> list[Form]:
    """Return the ways to store a weight, with what each is expected to change of the outputs."""
    weight, rows = measured.weight, measured.weight.flatten(0, -2)
    found = [coded(weight, bits, group_size, symmetric) for bits, group_size in FORMS]
    spreads = [_spread(rows, codes) for codes in found]
    per_spread = measured.sensitivity / spreads[0] if spreads[0] else 0.0
    forms = [Form(None, weight.numel() * weight.element_size(), 0.0)]
    for codes, spread in zip(found, spreads, strict=True):
        error = per_spread * spread
        size = codes.size_bytes(weight, measured.scale_bytes)
        forms.append(Form(replace(codes, sensitivity=error), size, error))
    return forms


def coded(weight: Tensor, bits: int, group_size: int | None, symmetric: bool) -> Codes:
    """Return how a weight is stored, its inputs in one group when they are no more than that."""
    features = weight.shape[-1]
    return Codes(bits, min(group_size or features, features), symmetric)


def _spread(rows: Float[Tensor, "rows in_features"], codes: Codes) -> float:
    """Return the squared distance of a weight from what its codes stand for."""
    grid = Grid.around(rows.t(), *codes.how)
    values = grid.values(rounded(rows.t(), grid), grid.groups(rows.shape[1]))
    return float((values - rows.t()).double().square().sum())


def sensitivities(
    program: Program, replaced: Sequence[tuple[Region, nn.Module]], calibration: Calibration
) -> dict[str, float]:
    """Return how much replacing each region alone changes the outputs.

    Returns:
        By label, the squared change relative to the squares of the outputs, the mean over the
        first calibration sets and over outputs.

    Raises:
        OptionError: There are no inputs, or outputs are not finite.
    """
    totals, count = dict.fromkeys((region.label for region, _ in replaced), 0.0), 0
    for inputs in islice(calibration, SETS):
        truth = run(program, inputs)
        for region, module in replaced:
            found = run(program, inputs, instead=[(region, module)])
            totals[region.label] += _apart(found, truth)
        count += 1
    if not count:
        raise needs_sensitivity()
    for label, total in totals.items():
        if not total < float("inf"):
            raise OptionError(
                "the model gives NaN or infinity on the calibration inputs.",
                where=label,
                remedy="leave out the batch that does, or repair the model.",
            )
    return {label: total / count for label, total in totals.items()}


def needs_sensitivity() -> OptionError:
    """Return the error of sharing bits out without a measurement."""
    return OptionError(
        "bits are shared out by what is measured on calibration inputs, and there are none.",
        remedy="give calibration=..., or bits=... instead of budget_bits.",
    )


def _apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)
             if b.is_floating_point() and b.numel()]  # fmt: skip
    tiny = torch.finfo(torch.float64).tiny
    ratios = [(a - b).square().sum() / b.square().sum().clamp_min(tiny) for a, b in pairs]
    return float(sum(ratios)) / max(1, len(ratios))


def shared_out(forms: Mapping[str, Sequence[Form]], budget_bytes: float) -> dict[str, Form]:
    """Choose a form for every weight, by the error that a further byte takes away.

    Args:
        forms: Forms of each weight, in any order.
        budget_bytes: What all of them may take together.

    Raises:
        OptionError: The smallest forms take more.
    """
    ladders = {label: ladder(found) for label, found in forms.items()}
    chosen = {label: steps[0] for label, steps in ladders.items()}
    left = budget_bytes - sum(form.size_bytes for form in chosen.values())
    if left < 0:
        raise OptionError(
            f"the smallest forms of all weights take {budget_bytes - left:,.0f} bytes, the budget"
            f" is {budget_bytes:,.0f}.",
            remedy="raise budget_bits.",
        )
    steps = [
        (_worth(low, high), label, high)
        for label, found in ladders.items()
        for low, high in pairwise(found)
    ]
    full = set[str]()
    for _, label, form in sorted(steps, key=lambda step: -step[0]):
        more = form.size_bytes - chosen[label].size_bytes
        if label in full or more > left:
            full.add(label)  # what follows for this weight builds on this step
            continue
        chosen[label], left = form, left - more
    return chosen


def ladder(forms: Sequence[Form]) -> list[Form]:
    """Return the forms worth their bytes, the smallest first: each step is worth less per byte."""
    steps: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.size_bytes, form.error)):
        if steps and form.error >= steps[-1].error:
            continue
        while len(steps) > 1 and _worth(steps[-1], form) >= _worth(steps[-2], steps[-1]):
            steps.pop()
        steps.append(form)
    return steps


def _worth(low: Form, high: Form) -> float:
    """Return the error that a byte more takes away."""
    return (low.error - high.error) / (high.size_bytes - low.size_bytes)
