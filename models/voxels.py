"""Clouds of points as grids of voxels, and back.

Source: Liu et al., PVCNN, 2019, arXiv:1907.03739 (means of points, read trilinearly).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def voxel_places(
    points: Float[Tensor, "batch channels points"], side: int
) -> Float[Tensor, "batch channels points"]:
    """Return where points stand in a grid that holds each cloud, 0 to side - 1 along each axis."""
    centred = points - points.mean(dim=2, keepdim=True)
    radius = centred.norm(dim=1, keepdim=True).amax(dim=2, keepdim=True)
    return ((centred / (2 * radius) + 0.5) * side).clamp(0, side - 1)


def voxelize(
    features: Float[Tensor, "batch channels points"],
    places: Float[Tensor, "batch 3 points"],
    side: int,
) -> Float[Tensor, "batch channels side side side"]:
    """Return the mean of the points nearest to each voxel; zero where there are none."""
    x, y, z = places.round().long().unbind(1)
    voxel = ((x * side + y) * side + z)[:, None]  # [batch, 1, points]
    grid = features.new_zeros(features.shape[0], 1 + features.shape[1], side**3)
    counted = torch.cat([torch.ones_like(features[:, :1]), features], dim=1)
    sums = grid.scatter_add(2, voxel.expand(-1, counted.shape[1], -1), counted)
    return (sums[:, 1:] / sums[:, :1].clamp_min(1)).unflatten(2, (side, side, side))


def devoxelize(
    grid: Float[Tensor, "batch channels side side side"], places: Float[Tensor, "batch 3 points"]
) -> Float[Tensor, "batch channels points"]:
    """Return the values at the points, linear between the eight voxels around each."""
    apart = places.flip(1).transpose(1, 2)[:, None, None]  # the last axis comes first
    unit = 2 * apart / (grid.shape[-1] - 1) - 1
    return F.grid_sample(grid, unit, align_corners=True)[:, :, 0, 0]
