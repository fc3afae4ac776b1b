"""Tokens of an image in the order of its tiles, so that neighbours in the order are neighbours.

row by row    a0 a1 a2 a3 ...        tile by tile    a0 a1 b0 b1 | a2 a3 b2 b3 | ...
b0 b1 b2 b3 ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A grid of tokens behind others, cut into tiles. Tokens are axis 2.

    Attributes:
        prefix: Tokens before the grid, which stay in place.
        grid: Sizes of the grid, as in `(rows, columns)`; empty for no grid, and nothing to do.
        tile: Sizes of a tile, which divide those of the grid.
    """

    prefix: int = 0
    grid: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    def to_tiles(self, x: Tensor) -> Tensor:
        """Put tokens into the order of tiles."""
        counts = [size // part for size, part in zip(self.grid, self.tile, strict=True)]
        split = [size for pair in zip(counts, self.tile, strict=True) for size in pair]
        return self._reordered(x, split, inner=2)

    def to_rows(self, x: Tensor) -> Tensor:
        """Put tokens back into the order of rows."""
        counts = [size // part for size, part in zip(self.grid, self.tile, strict=True)]
        return self._reordered(x, [*counts, *self.tile], inner=len(self.grid))

    def _reordered(self, x: Tensor, sizes: list[int], inner: int) -> Tensor:
        """View axis 2 in some sizes, and take every `inner`-th axis of them after the other."""
        if not self.grid:
            return x
        axes = [2 + axis for start in range(inner) for axis in range(start, len(sizes), inner)]
        cells = x[:, :, self.prefix :].unflatten(2, sizes)
        tokens = cells.permute(0, 1, *axes, cells.dim() - 1).flatten(2, -2)
        return torch.cat((x[:, :, : self.prefix], tokens), dim=2) if self.prefix else tokens
