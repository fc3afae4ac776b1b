"""A grid of tokens cut into windows, and put together again.

    grid 6 x 6, windows of 4 x 4             the same, shifted by 2 x 2

    0 0 0 0 | 1 1 . .                        3 3 | 2 2 2 2         . is padding; windows of the
    0 0 0 0 | 1 1 . .                        ----+--------         shifted grid wrap around, and a
    ...                                      1 1 | 0 0 0 0         token sees none across the edge

Shifted windows wrap around the edge of the padded grid, so that all are of one size. What lies on
different sides of the edge, padding included, is another *region*; tokens see their own region
only. So all that is masked is cells of one window, [windows, cells, cells], never the sequence.

Source: Liu et al., Swin, 2021, arXiv:2103.14030, section 3.2 (cyclic shift).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tiling:
    """A grid of tokens cut into windows.

    Attributes:
        grid: Tokens along each axis.
        window: Side of a window along each axis.
        shift: Cells by which windows begin later, along each axis.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Tokens of a window."""
        return math.prod(self.window)

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows along each axis."""
        return tuple(-(-side // w) for side, w in zip(self.grid, self.window, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Cells along each axis, those missing in the last window included."""
        return tuple(n * w for n, w in zip(self.counts, self.window, strict=True))

    @property
    def padding(self) -> tuple[int, ...]:
        """Cells missing in the last window, along each axis."""
        return tuple(whole - side for whole, side in zip(self.padded, self.grid, strict=True))

    def split(
        self, x: Float[Tensor, "batch heads seq dim"]
    ) -> Float[Tensor, "windows rows cells dim"]:
        """Return the windows of each head of each sample; `rows` runs over samples and heads."""
        axes = len(self.grid)
        if any(self.padding):
            pads = (n for pad in self.padding[::-1] for n in (0, pad))
            x = F.pad(x.unflatten(2, self.grid), (0, 0, *pads)).flatten(2, -2)
        if any(self.shift):
            back, dims = [-n for n in self.shift], list(range(2, 2 + axes))
            x = x.unflatten(2, self.padded).roll(back, dims).flatten(2, -2)
        x = x.unflatten(2, [n for pair in zip(self.counts, self.window, strict=True) for n in pair])
        places, cells = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        x = x.permute(*places, 0, 1, *cells, 2 + 2 * axes)
        return x.flatten(axes + 2, -2).flatten(axes, axes + 1).flatten(0, axes - 1)

    def join(
        self, y: Float[Tensor, "windows rows cells dim"], heads: int
    ) -> Float[Tensor, "batch seq heads dim"]:
        """Undo `split`, heads behind tokens."""
        axes = len(self.grid)
        y = y.unflatten(2, self.window).unflatten(1, (-1, heads)).unflatten(0, self.counts)
        inner = (axis for i in range(axes) for axis in (i, axes + 2 + i))
        y = y.permute(axes, *inner, axes + 1, 2 * axes + 2).flatten(1, 2 * axes)
        if any(self.shift):
            dims = list(range(1, 1 + axes))
            y = y.unflatten(1, self.padded).roll(list(self.shift), dims).flatten(1, axes)
        if any(self.padding):
            y = y.unflatten(1, self.padded)
            for axis, side in enumerate(self.grid, 1):
                y = y.narrow(axis, 0, side)
            y = y.flatten(1, axes)
        return y

    def regions(self) -> Int[Tensor, "windows cells"] | None:
        """Number the parts that windows fall into; None when every window is one part."""
        number = torch.zeros((), dtype=torch.int32)
        for side, whole, shift in zip(self.grid, self.padded, self.shift, strict=True):
            place = torch.arange(whole, dtype=torch.int32) + shift
            part = torch.where(place % whole < side, (place >= whole).int(), 2)
            number = 3 * number[..., None] + part
        still = Tiling(self.padded, self.window, (0,) * len(self.window))
        found = still.split(number.reshape(1, 1, -1, 1))[:, 0, :, 0]
        return None if bool((found == found[:, :1]).all()) else found
