"""Linear maps fitted to calibration, from sums that do not grow with the number of samples.

    W, b = argmin  sum |x @ W.T + b - y|^2 + ridge |W|^2

    fit = LeastSquares()
    for x, y in values:
        fit.add(x, y)
    weight, bias = fit.solve()          # [out_dim, in_dim], [out_dim]

The normal equations are summed and solved in fp64. Means are taken out first: the bias is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.recognize.place import Place
from ...ir.taps import tapped

RIDGE = 1e-8  # of the mean variance: as good as none where there are more samples than channels


@dataclass
class LeastSquares:
    """Sums over samples of two values.

    Attributes:
        count: Samples seen.
        sums: By name: `x`, `y`, `xx`, `xy`, `yy` (of squares alone).
    """

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Float[Tensor, "*batch in_dim"], y: Float[Tensor, "*batch out_dim"]) -> None:
        """Take in some samples."""
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        products = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y,
                    "yy": y.square().sum()}  # fmt: skip
        self.count += len(x)
        self.sums = {name: self.sums.get(name, 0) + found for name, found in products.items()}

    def solve(
        self, ridge: float = RIDGE
    ) -> tuple[Float[Tensor, "out_dim in_dim"], Float[Tensor, " out_dim"]]:
        """Return weight and bias of the best linear map, in fp64.

        Args:
            ridge: Penalty of large weights, relative to the mean variance of a channel of x.

        Raises:
            OptionError: There are no samples, or some are not finite.
        """
        xx, xy = self._centred()
        size = ridge * xx.diagonal().mean().clamp_min(torch.finfo(xx.dtype).tiny)
        solved = torch.linalg.lstsq(xx + size * torch.eye(len(xx), dtype=xx.dtype), xy)
        weight = solved.solution.T
        return weight, (self.sums["y"] - weight @ self.sums["x"]) / self.count

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return |x @ W.T + b - y| relative to |y|: 1 for a map that gives zero."""
        s, n = self.sums, self.count
        squares = s["yy"] - 2 * ((weight @ s["xy"]).trace() + bias @ s["y"])
        squares = squares + (weight @ s["xx"] @ weight.T).trace()
        squares = squares + 2 * bias @ weight @ s["x"] + n * bias @ bias
        return float((squares.clamp_min(0) / s["yy"].clamp_min(torch.finfo().tiny)).sqrt())

    def lost(self, ridge: float = RIDGE) -> float:
        """Return how far x + fit(x) is from x + y at best, relative to x + y."""
        best, s = self.solve(ridge), self.sums
        size = s["xx"].trace() + 2 * s["xy"].trace() + s["yy"]
        return self.error(*best) * float((s["yy"] / size).sqrt())

    def _centred(self) -> tuple[Tensor, Tensor]:
        if not self.count:
            raise OptionError(
                "a linear map is fitted to calibration inputs, and there are none.",
                remedy="give calibration=...",
            )
        if not all(bool(found.isfinite().all()) for found in self.sums.values()):
            raise OptionError(
                "the model gives NaN or infinity on the calibration inputs.",
                remedy="leave out the batch that does, or repair the model.",
            )
        s = self.sums
        mean = s["x"] / self.count
        return s["xx"] - torch.outer(mean, s["x"]), s["xy"] - torch.outer(mean, s["y"])


def residual_fits(
    program: Program,
    ends: Sequence[tuple[Place, Place]],
    calibration: Iterable[Sequence[Tensor]],
) -> list[LeastSquares]:
    """Return the sums that fit `after - before` to `before`, for each pair of values."""
    module = tapped(program, [place for pair in ends for place in pair])
    fits = [LeastSquares() for _ in ends]
    for inputs in calibration:
        with torch.no_grad():
            values = iter(module(*inputs))
        for fit, before, after in zip(fits, values, values, strict=False):
            fit.add(before, after.double() - before.double())
    return fits
