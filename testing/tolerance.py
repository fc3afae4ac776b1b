"""When two results agree. Four rules, none with a tolerance picked by hand.

    T0  bitwise
    TX  bitwise, on integers small enough for every order of summation to be exact
    T1  as far from fp64 as the original, give or take rounding
    T2  within a bound derived from the weights

The constants of T1 are those of PyTorch's own accuracy checks, and a little more for small tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Integers up to two to this power are exact."""


def t0(new: Sequence[Tensor], old: Sequence[Tensor], what: str = "output") -> None:
    """Ask for equal bits, types and shapes; NaN equals NaN.

    Raises:
        AssertionError: Something differs.
    """
    assert len(new) == len(old), f"{len(new)} values of {what} instead of {len(old)}"
    for index, (a, b) in enumerate(zip(new, old, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), (
            f"{what} {index} is {a.dtype} {list(a.shape)}, was {b.dtype} {list(b.shape)}"
        )
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        assert bool(same.all()), f"{what} {index} differs in {int((~same).sum())} of {a.numel()}"


def tx(new: Sequence[Tensor], old: Sequence[Tensor], largest: float) -> None:
    """Ask for equal bits where every sum is exact, whatever its order.

    Args:
        new: Outputs to judge.
        old: What they should be.
        largest: Largest sum of absolute terms anywhere in the model.

    Raises:
        AssertionError: The sums may round, or something differs.
    """
    for value in old:
        assert largest < 2.0 ** MANTISSA[value.dtype], f"sums reach {largest}, which may round"
    t0(new, old)


def t1(new: Sequence[Tensor], eager: Sequence[Sequence[Tensor]], truth: Sequence[Tensor]) -> None:
    """Ask that no output is further from fp64 than the original's own rounding explains.

    Args:
        new: Outputs to judge.
        eager: Outputs of the original: as they are, and with weights moved by a rounding each. One
            run of a small model may be right by luck; the worst of several is no accident.
        truth: Outputs of the original in fp64.

    Raises:
        AssertionError: One is.
    """
    for index, (value, exact) in enumerate(zip(new, truth, strict=True)):
        runs = [run[index] for run in eager]
        assert (value.dtype, value.shape) == (runs[0].dtype, runs[0].shape)
        if not value.is_floating_point():
            t0([value], [runs[0]])
            continue
        margin = torch.finfo(value.dtype).max / 4
        safe = (exact.abs() < margin) & torch.stack([r.isfinite() for r in runs]).all(dim=0)
        assert bool(value[safe].isfinite().all()), f"output {index} became NaN or infinite"
        _closer(value[safe].double(), [r[safe].double() for r in runs], exact[safe].double(),
                torch.finfo(value.dtype).eps / 2, index)  # fmt: skip


def t2(error: Tensor, bound: Tensor, scale: Tensor, unit: float) -> float:
    """Return how much of a derived bound an error uses, rounding allowed for; 1 is all of it.

    Args:
        error: Differences.
        bound: Largest difference allowed for each; broadcasts.
        scale: What was added up to get there, of which `unit` may be lost each time.
        unit: Unit roundoff of the computation.
    """
    allowed = bound * 1.001 + 64 * unit * scale
    used = torch.where(error == 0, torch.zeros_like(error), error.abs() / allowed)
    return float(used.nan_to_num(nan=math.inf).max()) if used.numel() else 0.0


def _closer(value: Tensor, runs: Sequence[Tensor], exact: Tensor, unit: float, index: int) -> None:
    if not value.numel():
        return
    worst = max(float((run - exact).norm()) for run in runs)
    factor = 3 if value.numel() >= 1000 else 8
    allowed = factor * worst + 8 * unit * float(exact.norm())
    assert float((value - exact).norm()) <= allowed, (
        f"output {index} is {float((value - exact).norm()):.3g} from fp64, the original {worst:.3g}"
    )
    most = max(float((run - exact).abs().max()) for run in runs)
    peak = 16 * most + 64 * unit * float(exact.abs().max())
    assert float((value - exact).abs().max()) <= peak, f"an element of output {index} is far off"
