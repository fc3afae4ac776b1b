"""What layers read on the calibration, in sums that do not grow with the number of samples.

    second = sum x x^T     [in_features, in_features]       |x @ D|^2 = sum D * (second @ D)

Layers that read one value share one sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.regions import Region
from ...ir.run import run
from ..base import Calibration


@dataclass
class Moments:
    """Sums over the vectors that a layer reads.

    Attributes:
        second: [in_features, in_features], of their outer products, in fp64.
        size: [in_features], of their absolute values, in fp64.
        count: How many there were.
    """

    second: Tensor
    size: Tensor
    count: int = 0

    @classmethod
    def none(cls, features: int) -> Moments:
        """Return the sums over no vectors."""
        square = torch.zeros(features, features, dtype=torch.float64)
        return cls(square, torch.zeros(features, dtype=torch.float64))

    def add(self, x: Float[Tensor, "*batch in_features"]) -> None:
        """Take in some vectors."""
        rows = x.flatten(0, -2).float().cpu()
        self.second += rows.T @ rows
        self.size += rows.abs().sum(0)
        self.count += len(rows)

    def error(self, change: Float[Tensor, "in_features out_features"]) -> float:
        """Return how far a change of a weight moves the layer's result, the mean of squares."""
        change = change.double()
        return float((change * (self.second @ change)).sum()) / self.count


def input_moments(
    program: Program, layers: Sequence[Region], calibration: Calibration
) -> dict[str, Moments]:
    """Return the moments of what each region reads first, by its label; one pass over the data.

    Regions that compute nothing on the calibration are left out.

    Raises:
        OptionError: There are no inputs, or values are not finite.
    """
    reads = {(layer.instance, layer.inputs[0]): layer for layer in layers}
    found: dict[tuple[str | None, fx.Node], Moments] = {}

    def see(instance: str | None, node: fx.Node, value: Any) -> None:
        key = instance, node
        if key in reads:
            if key not in found:
                found[key] = Moments.none(int(value.shape[-1]))
            found[key].add(value)

    seen = False
    for inputs in calibration:
        run(program, inputs, on_node=see)
        seen = True
    if not seen:
        raise OptionError(
            "codes are found on calibration inputs, and there are none.",
            remedy="give calibration=..., or use method=rtn.",
        )
    _require_finite({reads[key].label: moments for key, moments in found.items()})
    keys = {layer.label: (layer.instance, layer.inputs[0]) for layer in layers}
    return {label: found[key] for label, key in keys.items() if key in found}


def _require_finite(found: Mapping[str, Moments]) -> None:
    for label, moments in found.items():
        if not bool(moments.second.isfinite().all()):
            raise OptionError(
                "it reads NaN or infinity on the calibration inputs.",
                where=label,
                remedy="leave out the batch that gives it, or repair the model.",
            )
