"""Compare numbers three ways: old, new, and the old computation in fp64.

The old program's own distance from fp64 says how much rounding explains; the new one's is judged
by it, never by a fixed tolerance. Whatever can be called on flat inputs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Sequence[Tensor]
Runnable = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class OutputError:
    """How far one output moved, relative to its norm.

    Attributes:
        old: Old program against fp64; None without a reference.
        new: New program against fp64; None without a reference.
        difference: New program against the old one.
        max_abs: Largest difference of one element.
        cosine: Smallest cosine between old and new along the last axis.
    """

    old: float | None
    new: float | None
    difference: float
    max_abs: float
    cosine: float


@dataclass(frozen=True)
class Verdict:
    """What became of one output.

    Attributes:
        error: How far it moved.
        rounding: Whether reassociation explains that; see `within_rounding`.
        finite: Whether it is finite wherever the old output was finite throughout.
    """

    error: OutputError
    rounding: bool
    finite: bool


def three_way(
    old: Runnable,
    new: Runnable,
    exact: Runnable | None,
    inputs: Iterable[Inputs],
    names: Sequence[str],
) -> dict[str, Verdict]:
    """Run two or three things on the same inputs and compare their outputs.

    Args:
        old: What is trusted.
        new: What is judged.
        exact: `old` in fp64; None when it does not fit.
        inputs: Sets of flat inputs.
        names: A name for each output.

    Returns:
        A verdict per output name.
    """
    sets = list(inputs)
    before, after = [list(old(flat)) for flat in sets], [list(new(flat)) for flat in sets]
    truth = None if exact is None else [list(exact(flat)) for flat in sets]
    return judge(before, after, truth, names)


def judge(
    old: Sequence[Sequence[Tensor]],
    new: Sequence[Sequence[Tensor]],
    exact: Sequence[Sequence[Tensor]] | None,
    names: Sequence[str],
) -> dict[str, Verdict]:
    """Compare outputs, one list of them per input set, and return a verdict per name."""
    verdicts: dict[str, Verdict] = {}
    for index, name in enumerate(names):
        before = [torch.as_tensor(outputs[index]) for outputs in old]
        after = [torch.as_tensor(outputs[index]) for outputs in new]
        truth = [torch.as_tensor(outputs[index]) for outputs in exact] if exact else None
        pairs = list(zip(before, after, strict=True))
        rounding = all(
            within_rounding(b, a, truth[i] if truth else None) for i, (a, b) in enumerate(pairs)
        )
        finite = all(_stays_finite(a, b) for a, b in pairs)
        verdicts[name] = Verdict(compare(before, after, truth), rounding, finite)
    return verdicts


def compare(
    old: Sequence[Tensor], new: Sequence[Tensor], exact: Sequence[Tensor] | None
) -> OutputError:
    """Measure the distance between the values of one output over several input sets."""
    before, after = _flat(old), _flat(new)
    truth = _flat(exact) if exact else None
    cosines = [
        float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min())
        for a, b in zip(old, new, strict=True)
        if a.numel() and a.dim() and a.shape[-1] > 1 and a.is_floating_point()
    ]
    return OutputError(
        old=None if truth is None else relative(before, truth),
        new=None if truth is None else relative(after, truth),
        difference=relative(after, before),
        max_abs=_max((after - before).nan_to_num()),
        cosine=min(cosines, default=1.0),
    )


def relative(value: Tensor, truth: Tensor) -> float:
    """Return ||value - truth|| / ||truth|| in fp64; 0 when both are zero."""
    finite = value.isfinite() & truth.isfinite()
    difference = float((value[finite].double() - truth[finite].double()).norm())
    scale = float(truth[finite].double().norm())
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def within_rounding(new: Tensor, old: Tensor, truth: Tensor | None) -> bool:
    """Say whether reassociation explains how far `new` is from the fp64 reference.

    The relative error may be three times (eight below 1,000 elements) that of `old` plus eight
    roundings; no element may be off by more than 16 times the worst of `old` plus 64 roundings.
    Without a reference, `old` stands for it. Both rules are scaled by the whole output: a fault
    confined to elements far smaller than the largest one can hide below them.
    """
    if not old.is_floating_point():
        return torch.equal(new, old)
    unit = torch.finfo(old.dtype).eps / 2
    exact = (old if truth is None else truth).double()
    finite = exact.isfinite() & old.isfinite()
    if not torch.equal(new[~finite].nan_to_num(), old[~finite].nan_to_num()):
        return False
    old, new, exact = old[finite], new[finite], exact[finite]
    factor = 3 if old.numel() >= 1000 else 8
    allowed = factor * relative(old, exact) + (8 if truth is not None else 64) * unit
    worst = 16 * _max(old.double() - exact) + 64 * unit * _max(exact)
    return relative(new, exact) <= allowed and _max(new.double() - exact) <= worst


def _stays_finite(old: Tensor, new: Tensor) -> bool:
    if not old.is_floating_point() or not old.isfinite().all():
        return True
    return bool(new.isfinite().all())


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in values])


def _max(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0
