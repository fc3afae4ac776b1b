"""Replace feed-forward networks by one linear layer each, on the stream itself.

    y = x + gate * ffn(modulate(norm(x)))      ->      y = x + x @ W.T + b        W: [dim, dim]

Norm, modulation and gate of the network go with it. W and b start as the best linear map on the
calibration, in closed form, and are trained from there. What is left of a modulation that made
scales for the network as well is cut out by `drop-idle-features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import FeedForward, Place, Summand
from .base import (
    Calibration,
    Evidence,
    Pass,
    Plan,
    Promise,
    Skip,
    count_of,
    require_choice,
    selected,
)
from .shared.least_squares import residual_fits
from .shared.losses import output_mse
from .shared.recovery import Fit, Stage
from .shared.students import DISTANCES, blocks_with, taught


@dataclass(frozen=True)
class Linearized:
    """Why a network is replaced.

    Attributes:
        error: Of the stream after it, relative to its size; None when not measured.
    """

    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LinearizeSublayers(Pass[Summand, Linearized]):
    """Replace the feed-forward networks that a linear layer can stand for best.

    A network `blocks.0.mlp` has the path `blocks.0.mlp.residual` here.

    Attributes:
        keep_ratio: Fraction of the networks that stay, rounded to whole ones; 0 takes all that
            `include` and `exclude` leave, and measures nothing.
        include: Glob patterns of networks that may be replaced.
        exclude: Glob patterns of networks that stay.
        distance: What the layers are trained by, at the end of their block: `direction_l1` or
            `direction_mse` between vectors scaled to length one, or `mse`.
        epochs: How often they see the calibration.
        rate: Learning rate.

    Raises:
        OptionError: An option is out of range, or there is nothing to measure on.

    Source: Ma et al., PPCL, 2025, arXiv:2511.16156 (width pruning).
    Differs: networks are chosen by the error of the closed form; each block is trained on what the
        model before has in front of it.
    Exact when: what a network adds is a linear map of its stream.
    """

    name: ClassVar[str] = "linearize-sublayers"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"keep_ratio": 0.0},)
    keep_ratio: float = 0.75
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    distance: str = "direction_l1"
    epochs: int = 1
    rate: float = 1e-4

    def __post_init__(self) -> None:
        require_choice(self.name, "distance", self.distance, tuple(DISTANCES))
        if not 0 <= self.keep_ratio <= 1:
            raise OptionError(
                f"{self.name}: keep_ratio={self.keep_ratio} is no fraction of networks to keep.",
                remedy="use 0 to 1.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        able = super().plan(program).decisions
        free = [region for region in self.regions(program) if region.label in able]
        if not self.keep_ratio or not free:
            return None
        fits = residual_fits(program, [ends_of(region) for region in free], calibration)
        errors = {r.label: fit.lost() for r, fit in zip(free, fits, strict=True)}
        return Evidence(count_of(calibration), errors)

    def decide(self, region: Summand) -> Linearized | Skip:
        network = region.sublayer.region
        if not isinstance(network, FeedForward):
            return Skip(f"is of another kind: {network.kind}", at=region)
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if region.objection:
            return Skip(region.objection, at=region)
        if not network.is_dense:
            return Skip("has packed weights", at=region)
        x = region.others[0].meta["val"]
        if network.axis != "channels" or x.shape[-1] != network.dim:
            return Skip("does not work along the last axis", at=region)
        return Linearized()

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Linearized]:
        able = super().plan(program)
        errors: Mapping[str, float] = evidence.regions if evidence else {}
        count = len(able.decisions) - round(self.keep_ratio * len(able.decisions))
        order = sorted(able.decisions, key=errors.__getitem__) if errors else list(able.decisions)
        taken = set(order[:count])
        decisions = {n: Linearized(errors.get(n)) for n in able.decisions if n in taken}
        stay = {n: "is kept: others are closer to linear" for n in order if n not in taken}
        return Plan(decisions, {**able.skips, **stay})

    def replace(self, region: Summand, decision: Linearized) -> nn.Module:
        network, (other,) = region.sublayer.region, region.others
        assert isinstance(network, FeedForward)
        like = torch.empty(0, dtype=other.meta["val"].dtype, device=network.up.device)
        return Shortcut(region.inputs.index(other), network.dim, like)

    def recovery(self, old: Program, new: Program, plan: Plan[Linearized]) -> Sequence[Stage]:
        regions = [region for region in self.regions(old) if region.label in plan.decisions]
        fits = [
            Fit(f"{region.label}.weight", f"{region.label}.bias", *ends_of(region))
            for region in regions
        ]
        runs = [(label, label, label) for label in blocks_with(old, regions)]
        loss, feeds = taught(old, new, runs, DISTANCES[self.distance])
        names = [name for fit in fits for name in (fit.weight, fit.bias)]
        return [
            Stage(
                name="linearize",
                weights=dict.fromkeys(names),
                loss=loss if loss.student else output_mse(old, new),
                fits=fits,
                feeds=feeds,
                epochs=self.epochs,
                rate=self.rate,
            )
        ]


class Shortcut(nn.Module):
    """A stream plus a linear map of it, at first zero.

    Args:
        pick: Which of its inputs the stream is.
        dim: Width of the stream.
        like: Has its type and device.
    """

    def __init__(self, pick: int, dim: int, like: Tensor) -> None:
        super().__init__()
        self.pick = pick
        self.weight = nn.Parameter(like.new_zeros(dim, dim), requires_grad=False)
        self.bias = nn.Parameter(like.new_zeros(dim), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[self.pick]
        return x + F.linear(x, self.weight, self.bias)


def ends_of(region: Summand) -> tuple[Place, Place]:
    """Return a stream before and after the addition of a sublayer."""
    return Place(region.instance, region.others[0]), Place(region.instance, region.outputs[0])
