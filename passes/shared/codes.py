"""Weights as integers of few bits: the values they are rounded to, and how they are stored.

    codes = round(w / scale) + zero      one scale and zero per output channel and group of inputs

Weights stand as columns here, [in_features, out_features], as their codes do; see `ir.ops.packing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...ir.errors import OptionError
from ...ir.ops import packing
from ..base import require_choice

SMOOTHING = ("norm", "factor")


@dataclass(frozen=True)
class Codes:
    """How one weight is stored.

    Attributes:
        bits: Bits per code.
        group_size: Inputs that share a scale.
        symmetric: No zero point.
        activations: `int8`, or None when activations stay in floating point.
        smoothing: Who divides inputs that weights are multiplied for: the `norm` before the layer,
            or a `factor` of its own; None when nobody does.
        sensitivity: Expected squared change of the outputs, relative to their squares, by this
            weight alone; None when nothing was measured.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str | None = None
    smoothing: str | None = None
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        require_choice("quantize-weights", "bits", self.bits, packing.BITS)
        require_choice("quantize-weights", "smoothing", self.smoothing, (None, *SMOOTHING))
        if self.group_size < 1:
            raise OptionError(
                f"quantize-weights: group_size={self.group_size} holds no weight; use 1 or more."
            )

    @property
    def how(self) -> tuple[int, int, bool]:
        """Bits, group size and whether there are no zero points."""
        return self.bits, self.group_size, self.symmetric

    def size_bytes(self, weight: Tensor, scale_bytes: int) -> int:
        """Return the bytes of a weight [*experts, out_features, in_features], scales included."""
        *experts, rows, columns = weight.shape
        groups = rows * -(-columns // self.group_size)
        zeros = 0 if self.symmetric else groups
        packed = sum(-(-count * self.bits // 8) for count in (rows * columns, zeros))
        return math.prod(experts) * (packed + groups * scale_bytes)


class Stored(NamedTuple):
    """A weight as ops take it: codes, scale [groups, out_features], zero points or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Grid:
    """What the weights of a layer can be: (code - zero) * scale.

    Attributes:
        scale: [groups, out_features], above 0.
        zero: Codes of zero, [groups, out_features]; all 0 when symmetric.
        bits: Bits per code.
        group_size: Inputs that share a scale; the last group may be shorter.
        symmetric: No zero point is stored.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def around(
        cls,
        columns: Float[Tensor, "in_features out_features"],
        bits: int,
        group_size: int,
        symmetric: bool,
    ) -> Self:
        """Return the grid that just holds the weights of every group."""
        low, high = packing.code_range(bits, symmetric)
        groups = -(-columns.shape[0] // group_size)
        padded = F.pad(columns.float(), (0, 0, 0, groups * group_size - columns.shape[0]))
        grouped = padded.reshape(groups, group_size, -1)
        if symmetric:
            scale = positive(grouped.abs().amax(dim=1) / high)
            zero = torch.zeros_like(scale)
        else:
            bottom, top = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
            scale = positive(top / high - bottom / high)
            zero = torch.round(-bottom / scale).clamp(low, high)
        return cls(scale, zero, bits, group_size, symmetric)

    def groups(self, in_features: int) -> Int[Tensor, " in_features"]:
        """Return the group of each input."""
        return torch.arange(in_features, device=self.scale.device) // self.group_size

    def nearest(
        self, columns: Float[Tensor, "inputs out_features"], group: Int[Tensor, " inputs"]
    ) -> Float[Tensor, "inputs out_features"]:
        """Return the codes of the values next to some weights, each input with its group."""
        low, high = packing.code_range(self.bits, self.symmetric)
        codes = torch.round(columns / self.scale[group]) + self.zero[group]
        return codes.clamp(low, high)

    def values(
        self, codes: Float[Tensor, "inputs out_features"], group: Int[Tensor, " inputs"]
    ) -> Float[Tensor, "inputs out_features"]:
        """Return what codes stand for."""
        return (codes - self.zero[group]) * self.scale[group]

    def stored(self, codes: Float[Tensor, "in_features out_features"]) -> Stored:
        """Return codes as ops take them."""
        zeros = None if self.symmetric else self._packed(self.zero)
        return Stored(self._packed(codes), self.scale, zeros)

    def _packed(self, codes: Tensor) -> Tensor:
        if self.bits == 4:
            return packing.pack_nibbles(codes.to(torch.int16))
        return codes.to(packing.code_dtype(self.symmetric)).contiguous()


def rounded(columns: Float[Tensor, "in_features out_features"], grid: Grid) -> Tensor:
    """Return the codes of weights that are each rounded to the nearest value of a grid."""
    return grid.nearest(columns.float(), grid.groups(columns.shape[0]))


def quantize(
    weight: Float[Tensor, "out_features in_features"], bits: int, group_size: int, symmetric: bool
) -> Stored:
    """Round a weight to nearest."""
    columns = weight.t()
    grid = Grid.around(columns, bits, group_size, symmetric)
    return grid.stored(rounded(columns, grid))


def quantize_experts(
    weight: Float[Tensor, "experts out_features in_features"],
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Stored:
    """Round the weights of all experts to nearest, each on its own; scales have their type."""
    each = []
    for own in weight:
        grid = Grid.around(own.t(), bits, group_size, symmetric)
        grid = replace(grid, scale=positive(grid.scale.to(weight.dtype)).float())
        each.append(grid.stored(rounded(own.t(), grid)))
    zeros = [one.zero_point for one in each if one.zero_point is not None]
    return Stored(
        torch.stack([one.codes for one in each]),
        torch.stack([one.scale for one in each]).to(weight.dtype),
        torch.stack(zeros) if zeros else None,
    )


def quantize_rows(
    weight: Float[Tensor, "rows columns"], limit: int = 127
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """Return symmetric int8 codes within +-`limit` and one scale per row."""
    values = weight.float()
    # Tables are large: one temporary of their size is enough.
    largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=1, keepdim=True)
    scale = positive(largest / limit)
    codes = (values / scale).round_().clamp_(-limit, limit)
    return codes.to(torch.int8), scale


def positive(scale: Tensor) -> Tensor:
    """A group of zeros (or of numbers too small to divide) takes scale 1 and codes 0."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
