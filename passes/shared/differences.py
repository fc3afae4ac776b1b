"""Forecast a value over steps from how it has changed.

    taylor:  v(k) ~ sum_i D_i (k - k0)^i / i!              D_i = (D_(i-1) - its last) / (k0 - k1)
    newton:  v(k) ~ sum_i D_i (k - k0) ... (k - k_(i-1))   D_i = (D_(i-1) - its last) / (k0 - k_i)

k0, k1, ... are the steps at which the value was computed, the last one first. With each value one
more order is there; the others are zero. Of order 0 the forecast is the last value. Both forms are
one up to order 1; beyond, only Newton's goes through the values it was made of.

Source: Liu et al., TaylorSeer, 2025, arXiv:2503.06923, section 3.2; divided differences: Newton.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BASES = ("taylor", "newton")
NEVER = -1  # the step of a value that is not there


def forecast(
    step: Int[Tensor, ""],
    differences: Float[Tensor, "orders ..."],
    steps: Int[Tensor, " orders"],
    basis: str,
) -> Float[Tensor, "..."]:
    """Return what a value will be at a step.

    Args:
        step: Later than `steps`.
        differences: D_0, D_1, ...
        steps: k0, k1, ...; -1 where there is none.
        basis: `taylor` or `newton`.
    """
    value, weight = differences[0], torch.ones_like(steps[0]).to(differences.dtype)
    for order in range(1, len(differences)):
        since = (step - steps[0 if basis == "taylor" else order - 1]).to(weight.dtype)
        weight = weight * since / (order if basis == "taylor" else 1)
        value = value + differences[order] * weight
    return value


def pushed(
    step: Int[Tensor, ""],
    value: Float[Tensor, "..."],
    differences: Float[Tensor, "orders ..."],
    steps: Int[Tensor, " orders"],
    basis: str,
) -> tuple[Float[Tensor, "orders ..."], Int[Tensor, " orders"]]:
    """Return differences and steps with one more value; one computed at step 0 is the first."""
    steps = torch.where(step == 0, NEVER, steps)
    found = [value.to(differences.dtype)]
    for order in range(1, len(differences)):
        apart = step - steps[0 if basis == "taylor" else order - 1]
        there = steps[order - 1] > NEVER
        divisor = torch.where(there, apart.to(differences.dtype), torch.inf)
        found.append((found[-1] - differences[order - 1]) / divisor)
    return torch.stack(found), torch.cat((step.reshape(1), steps[:-1]))
