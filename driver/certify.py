"""Measure what a pass did to the numbers, and hold it to its promise.

Three runs on the same inputs: the old program, the new program, and the old program in fp64. The
old program's own distance from fp64 says how much rounding explains; an exact pass may not exceed
a small multiple of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import VerifyError
from ..ir.program import Program
from ..ir.regions import Region
from ..ir.run import run
from ..passes.base import Pass, Promise

Inputs = Sequence[Tensor]
REFERENCE_LIMIT_BYTES = 2 << 30  # above this many weight bytes there is no fp64 reference
BOUNDS_CHECKED = 64  # regions whose bound is checked, spread evenly over the model


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
class BoundCheck:
    """Whether replaced regions stay within the method's own bound.

    Attributes:
        checked: Regions looked at.
        worst_ratio: Largest error divided by the bound; at most 1 when the bound holds.
        worst_at: Where.
    """

    checked: int
    worst_ratio: float
    worst_at: str


@dataclass(frozen=True)
class Certificate:
    """What was measured of one pass.

    Attributes:
        outputs: Error by output path.
        blocks: Relative difference of the outputs of each block instance.
        bound: The check of a bounded pass.
        inputs: Number of input sets measured on.
    """

    outputs: dict[str, OutputError]
    blocks: dict[str, float]
    bound: BoundCheck | None
    inputs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Observed:
    """Outputs and block outputs of a program on several input sets."""

    outputs: list[list[Tensor]]
    blocks: list[dict[str, list[Tensor]]]


def observe(
    program: Program, inputs: Sequence[Inputs], dtype: torch.dtype | None = None
) -> Observed:
    """Run a program and keep its outputs and those of its blocks."""
    outputs: list[list[Tensor]] = []
    blocks: list[dict[str, list[Tensor]]] = []
    for flat in inputs:
        seen: dict[str, list[Tensor]] = {}
        outputs.append(run(program, flat, dtype=dtype, on_block=_keep(seen)))
        blocks.append(seen)
    return Observed(outputs, blocks)


def reference(program: Program, inputs: Sequence[Inputs]) -> list[list[Tensor]] | None:
    """Return the outputs in fp64, or None for a model too large to hold in it."""
    size = sum(t.numel() * t.element_size() for t in program.tensors.values())
    if size > REFERENCE_LIMIT_BYTES:
        return None
    return [run(program, flat, dtype=torch.float64) for flat in inputs]


def certify(
    pass_: Pass[Any, Any],
    program: Program,
    old: Observed,
    new: Observed,
    exact: list[list[Tensor]] | None,
    bound: BoundCheck | None,
) -> Certificate:
    """Compare two programs and check the promise of the pass between them.

    Raises:
        VerifyError: An exact pass moved the numbers further than reassociation explains, a
            bounded one further than its bound, or NaN appeared.
    """
    names = [p for i, p in enumerate(program.signature.outputs.paths())
             if i not in program.signature.constants]  # fmt: skip
    names = [name or "output" for name in names] + [slot.name for slot in program.state]
    outputs: dict[str, OutputError] = {}
    for index, name in enumerate(names):
        before = [torch.as_tensor(flat[index]) for flat in old.outputs]
        after = [torch.as_tensor(flat[index]) for flat in new.outputs]
        truth = [torch.as_tensor(flat[index]) for flat in exact] if exact else None
        outputs[name] = compare(before, after, truth)
        _check_finite(pass_, name, before, after)
        if pass_.promise is Promise.EXACT:
            _check_exact(pass_, name, before, after, truth)
    if bound is not None and bound.worst_ratio > 1:
        raise VerifyError(
            f"{pass_.name} moved an output {bound.worst_ratio:.3g} times as far as it promises.",
            where=bound.worst_at,
            remedy=f"leave it out with exclude={bound.worst_at!r}, and report it.",
        )
    return Certificate(outputs, _block_errors(old, new), bound, len(old.outputs))


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
    Without a reference, `old` stands for it.
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


def check_bounds(
    pass_: Pass[Any, Any],
    program: Program,
    replaced: Sequence[tuple[Region, nn.Module]],
    inputs: Sequence[Inputs],
) -> BoundCheck | None:
    """Replay replaced regions and their modules in fp64 and compare with the method's bound."""
    if pass_.promise is not Promise.BOUNDED:
        return None
    checks = _Bounds(pass_)
    for flat in inputs:
        checks.expect(_sample(replaced))
        run(program, flat, on_node=checks.saw)
    return BoundCheck(checks.done, checks.worst, checks.worst_at) if checks.done else None


class _Bounds:
    """Checks each region as soon as its inputs have been computed, and lets go of them."""

    def __init__(self, pass_: Pass[Any, Any]) -> None:
        self.pass_ = pass_
        self.done, self.worst, self.worst_at = 0, 0.0, ""
        self._waiting: dict[tuple[str | None, fx.Node], list[_Replaced]] = {}

    def expect(self, replaced: Sequence[tuple[Region, nn.Module]]) -> None:
        """Check these regions in the next run."""
        self._waiting.clear()
        for region, module in replaced:
            waiting = _Replaced(region, module, {})
            for node in dict.fromkeys(region.inputs):
                self._waiting.setdefault((region.instance, node), []).append(waiting)

    def saw(self, instance: str | None, node: fx.Node, value: Any) -> None:
        """Take a value; check the regions it completes."""
        for waiting in self._waiting.pop((instance, node), ()):
            waiting.values[node] = value
            if len(waiting.values) == len(set(waiting.region.inputs)):
                self._check(waiting.region, waiting.module, waiting.values)
                waiting.values.clear()

    def _check(self, region: Region, module: nn.Module, known: dict[fx.Node, Any]) -> None:
        values = [_double(known[node]) for node in region.inputs]
        module = module.double()
        limit = self.pass_.bound(region, module, *values)
        if limit is None:
            return
        expected, found = region.replay(values, torch.float64), _several(module(*values))
        limits = _several(limit) if isinstance(limit, tuple) else (limit,) * len(found)
        self.done += 1
        for truth, value, allowed in zip(expected, found, limits, strict=True):
            if not value.numel():
                continue
            slack = 64 * torch.finfo(torch.float32).eps * truth.abs().max()
            ratios = (value - truth).abs() / (allowed * 1.001 + slack)
            ratio = float(ratios.nan_to_num(nan=math.inf).max())
            if ratio >= self.worst:
                self.worst, self.worst_at = ratio, region.label


@dataclass(frozen=True)
class _Replaced:
    """A region that waits for its inputs."""

    region: Region
    module: nn.Module
    values: dict[fx.Node, Any]


def _sample(replaced: Sequence[tuple[Region, nn.Module]]) -> list[tuple[Region, nn.Module]]:
    """Draw regions from every path below the blocks, so that no kind of layer goes unchecked."""
    by_path: dict[str, list[tuple[Region, nn.Module]]] = {}
    for pair in replaced:
        by_path.setdefault(pair[0].path, []).append(pair)
    share = max(1, BOUNDS_CHECKED // max(len(by_path), 1))
    draw = random.Random(0)
    return [
        pair
        for found in by_path.values()
        for pair in (found if len(found) <= share else draw.sample(found, share))
    ]


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _check_exact(
    pass_: Pass[Any, Any],
    name: str,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    truth: Sequence[Tensor] | None,
) -> None:
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        if not within_rounding(after, before, truth[index] if truth else None):
            raise VerifyError(
                f"{pass_.name} promises exact results and moved output {name!r} by"
                f" {relative(after, before):.3g} of its norm.",
                remedy="run the pass alone with print_ir_after to see what it changed, and"
                " report it.",
            )


def _check_finite(
    pass_: Pass[Any, Any], name: str, old: Sequence[Tensor], new: Sequence[Tensor]
) -> None:
    for before, after in zip(old, new, strict=True):
        if before.is_floating_point() and before.isfinite().all() and not after.isfinite().all():
            raise VerifyError(
                f"{pass_.name} made output {name!r} infinite or NaN.",
                remedy="exclude blocks until it stays finite; the certificate of each pass alone"
                " shows where it begins.",
            )


def _block_errors(old: Observed, new: Observed) -> dict[str, float]:
    errors: dict[str, float] = {}
    for before, after in zip(old.blocks, new.blocks, strict=True):
        for name in before.keys() & after.keys():
            pairs = zip(before[name], after[name], strict=False)
            worst = max((relative(b, a) for a, b in pairs if a.is_floating_point()), default=0.0)
            errors[name] = max(errors.get(name, 0.0), worst)
    return {name: errors[name] for name in (old.blocks[0] if old.blocks else ()) if name in errors}


def _keep(seen: dict[str, list[Tensor]]) -> Any:
    def on_block(name: str, outputs: Sequence[Any]) -> None:
        seen[name] = [value for value in outputs if isinstance(value, Tensor)]

    return on_block


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in values])


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _max(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0
