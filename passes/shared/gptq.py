"""Codes whose errors make up for each other on the calibration.

    for input i, in order:   code[i] = round(w[i])
    for all j after it:      w[j] -= U[i, j] * (w[i] - value[i]) / U[i, i]

U is the upper Cholesky factor of the inverse of sum x x^T. All outputs take their step at once.

Source: Frantar et al., GPTQ, 2023, arXiv:2210.17323 (algorithm 1).
Differs: scales and zero points stay those of rounding to nearest, for every group.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .codes import Grid

BLOCK = 128  # inputs whose updates of the others are put off and done in one product


def gptq(
    columns: Float[Tensor, "in_features out_features"],
    second: Float[Tensor, "in_features in_features"],
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = BLOCK,
) -> Float[Tensor, "in_features out_features"]:
    """Return the codes of a weight.

    Args:
        columns: The weight.
        second: Sum of the outer products of what the layer reads, in fp64. Inputs that are always
            zero are rounded to nearest.
        grid: What codes stand for.
        damping: Added to the diagonal, relative to its mean.
        act_order: Take the inputs that are largest first, instead of in their order.
        block: Inputs between two updates of all that follow.
    """
    sizes = second.diagonal()
    order = sizes.argsort(descending=True, stable=True) if act_order else torch.arange(len(sizes))
    left, factor = columns[order].float(), _factor(second[order][:, order], damping).float()
    group, codes = grid.groups(len(sizes))[order], torch.empty_like(left)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            codes[i] = _row(grid.nearest, left[i], group[i])
            errors[i - start] = (left[i] - _row(grid.values, codes[i], group[i])) / factor[i, i]
            left[i:stop] -= factor[i, i:stop, None] * errors[i - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result


def _row(of_grid: object, row: Tensor, group: Int[Tensor, ""]) -> Tensor:
    found: Tensor = of_grid(row[None], group[None])[0]  # type: ignore[operator]
    return found


def _factor(second: Tensor, damping: float) -> Float[Tensor, "in_features in_features"]:
    """Return the upper Cholesky factor of the inverse of the damped matrix."""
    sizes = second.diagonal()
    idle = sizes <= 0
    mean = sizes[~idle].mean() if bool((~idle).any()) else torch.ones((), dtype=second.dtype)
    damped = second + torch.diag(torch.where(idle, mean, damping * mean))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
