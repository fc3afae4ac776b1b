"""Hold replaced regions to the bound of the method, and the new program to its parts.

A bounded pass is checked in two halves. Every replaced region is replayed in fp64 beside the
module that stands in its place: the module may be as far off as the method's formula allows. And
the old program, run with those modules called in the place of the regions, must give what the new
program gives: what was spliced in is what was checked.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import VerifyError
from ..ir.program import Program
from ..ir.regions import Region
from ..ir.run import run
from ..passes.base import Pass, Promise
from .numerics import Inputs, relative, within_rounding

BOUNDS_CHECKED = 64  # regions whose bound is checked, spread evenly over the model
Replaced = Sequence[tuple[Region, nn.Module]]


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


def check_spliced(
    pass_: Pass[Any, Any],
    program: Program,
    replaced: Replaced,
    inputs: Inputs,
    found: Sequence[Tensor],
) -> None:
    """Compare the new program with the old one whose regions are computed by their modules.

    Args:
        pass_: Who replaced them.
        program: The old program.
        replaced: Its regions and what stands in their place.
        inputs: Flat inputs.
        found: Outputs of the new program on them.

    Raises:
        VerifyError: They differ by more than rounding.
    """
    expected = run(program, inputs, instead=replaced)
    for index, (wanted, value) in enumerate(zip(expected, found, strict=True)):
        if isinstance(wanted, Tensor) and not within_rounding(value, wanted, None):
            raise VerifyError(
                f"{pass_.name}: output {index} of the new program is {relative(value, wanted):.3g}"
                " of its norm away from the old one with the pass's modules in it.",
                remedy="a weight or value is connected wrongly; report it with a reproducer"
                " (reproducer=DIR).",
            )


def check_bounds(
    pass_: Pass[Any, Any], program: Program, replaced: Replaced, inputs: Sequence[Inputs]
) -> BoundCheck | None:
    """Replay replaced regions and their modules in fp64 and compare with the method's bound."""
    if pass_.promised() is not Promise.BOUNDED:
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

    def expect(self, replaced: Replaced) -> None:
        """Check these regions in the next run."""
        self._waiting.clear()
        for region, module in replaced:
            if not region.inputs:
                self._check(region, module, {})
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
        module = copy.deepcopy(module).double()  # what it shares with the program stays as it is
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
            ratio = float(ratios.masked_fill(value == truth, 0).nan_to_num(nan=math.inf).max())
            if ratio >= self.worst:
                self.worst, self.worst_at = ratio, region.label


@dataclass(frozen=True)
class _Replaced:
    """A region that waits for its inputs."""

    region: Region
    module: nn.Module
    values: dict[fx.Node, Any]


def _sample(replaced: Replaced) -> list[tuple[Region, nn.Module]]:
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


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
