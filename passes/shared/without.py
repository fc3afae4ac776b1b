"""Take a sublayer out of its streams, and tell how much one matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.recognize import Place, Summand
from ...ir.taps import tapped
from ..base import Calibration
from .bypass import Bypass
from .influence import mean_over, turned


def without(region: Summand) -> Bypass:
    """Return what stands in the place of a sublayer's addition; ask for its `objection` first."""
    return Bypass([region.inputs.index(other) for other in region.others])


def apart(regions: Iterable[Summand]) -> list[Summand]:
    """Return those that can go together: of several that join in one addition, the first."""
    taken: set[tuple[str | None, fx.Node]] = set()
    found = []
    for region in regions:
        places = {(region.instance, node) for node in region.nodes}
        if taken.isdisjoint(places):
            taken |= places
            found.append(region)
    return found


def sublayer_influence(
    program: Program, regions: Sequence[Summand], calibration: Calibration
) -> dict[str, float]:
    """Return 1 - cos(before, after) of every sublayer, the mean over tokens, streams and inputs.

    Before is what it is added to, after is the sum.

    Raises:
        OptionError: There are no calibration inputs, or activations are not finite.
    """
    pairs = [
        [
            (Place(r.instance, a), Place(r.instance, b))
            for a, b in zip(r.others, r.outputs, strict=True)
        ]
        for r in regions
    ]
    module = tapped(program, [place for ends in pairs for pair in ends for place in pair])

    def measured(inputs: Sequence[Tensor]) -> Tensor:
        values = iter(module(*inputs))
        both = [[(next(values), next(values)) for _ in ends] for ends in pairs]
        return torch.stack([turned(*zip(*ends, strict=True)) for ends in both])

    means = mean_over(calibration, measured)
    return dict(zip([region.label for region in regions], means.tolist(), strict=True))
