"""LEGO: a diffusion transformer of bricks that stack, may be left out, and fit any canvas.

    z_1 = brick_1([x, places])        z_k = brick_k([z_(k-1), x, places])

A brick is a small DiT that looks at square regions of the image, each for itself, and every brick
puts out a whole image: an estimate the next one improves. So a chain may end early, and a larger
image is more regions. Small regions refine, regions as large as the image compose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .dit import Block, DiTConfig, grid_waves, time_waves, zero_linear

SIGMA_DATA = 0.5  # standard deviation that images are assumed to have


@dataclass(frozen=True)
class BrickConfig:
    """Sizes of a brick.

    Attributes:
        region: Height and width of a region, a multiple of `patch`.
        patch: Height and width of a patch.
        depth: Blocks.
    """

    region: int
    patch: int
    depth: int


@dataclass(frozen=True)
class LegoConfig:
    """Sizes of a chain of bricks.

    Attributes:
        size: Height and width of an image, a multiple of every region.
        channels: Channels of an image.
        classes: Classes; one more label stands for none. 0 for a model without labels.
        dim: Width of the residual stream, a multiple of `heads` and of 4.
        heads: Attention heads.
        bricks: The chain, first to last.

    Source: Zheng et al., 2024, arXiv:2310.06389; code: github.com/JegZheng/LEGODiffusion.
    Differs: positions are buffers and labels a table, where the released code has frozen
        parameters and a linear layer of the same function; there are no labels of augmentations.
    """

    size: int = 32
    channels: int = 4
    classes: int = 1000
    dim: int = 1152
    heads: int = 16
    bricks: tuple[BrickConfig, ...] = ()


def chain(regions: str, patches: str, depths: str) -> tuple[BrickConfig, ...]:
    """Return bricks from three lists of numbers."""
    columns = (map(int, text.split()) for text in (regions, patches, depths))
    return tuple(BrickConfig(*row) for row in zip(*columns, strict=True))


# PG grows from small regions to the whole image, PR refines the whole in ever smaller regions, U
# does both.
S_PG_64 = LegoConfig(64, 3, 0, dim=384, heads=6, bricks=chain("4 16 64", "2 8 2", "2 4 6"))
L_PG_64 = LegoConfig(64, 3, dim=1024, heads=16, bricks=chain("4 16 64", "2 8 2", "6 8 12"))
L_PR_64 = LegoConfig(64, 3, dim=1024, heads=16, bricks=L_PG_64.bricks[::-1])
XL_PG_32 = LegoConfig(bricks=chain("4 16 32", "2 8 2", "4 12 14"))
XL_PR_32 = LegoConfig(bricks=XL_PG_32.bricks[::-1])
XL_U_32 = LegoConfig(bricks=chain("32 16 4 16 32", "2 8 2 8 2", "14 10 4 10 14"))
XL_PG_64 = LegoConfig(64, bricks=chain("4 16 64", "2 8 2", "4 12 14"))
TOY = LegoConfig(8, classes=5, dim=8, heads=2, bricks=chain("8 4", "4 2", "2 2"))


class Lego(nn.Module):
    """A chain of bricks steered by noise level and class."""

    def __init__(self, config: LegoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.noise = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.bricks = nn.ModuleList(
            Brick(config, brick, first=index == 0) for index, brick in enumerate(config.bricks)
        )

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Return what the last brick makes of a noisy image.

        `noise` is a quarter of the logarithm of its standard deviation, `x` has been scaled: see
        `denoise`. Label `classes` stands for none. Height and width are multiples of all regions.
        """
        return self.estimates(x, noise, label)[-1]

    def estimates(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
        *,
        skipped: Collection[int] = (),
    ) -> list[Tensor]:
        """Return what each brick makes of a noisy image.

        Args:
            x: As `forward`, and so are `noise` and `label`.
            noise: Noise level.
            label: Class.
            skipped: Bricks left out, counted from 0. The next one reads what the one before them
                made. The first brick is none of them: there is nothing else to begin with.
        """
        image = torch.cat((x, places(x)), dim=1)
        condition = self.noise(time_waves(noise, 256).to(x.dtype))
        if self.labels is not None and label is not None:
            condition = condition + self.labels(label)
        found: list[Tensor] = []
        for index, brick in enumerate(self.bricks):
            if index not in skipped:
                found.append(brick(torch.cat((*found[-1:], image), dim=1), condition))
        return found

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Return a valid batch of images of different noise; every other has no class."""
        shape = batch, self.config.channels, self.config.size, self.config.size
        x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        labels = torch.arange(batch) % 2 * self.config.classes
        return x, torch.linspace(-1, 1, batch), *((labels,) if self.labels is not None else ())


class Brick(nn.Module):
    """A DiT that maps every region of an image for itself; a fresh one returns zeros."""

    positions: Tensor

    def __init__(self, config: LegoConfig, brick: BrickConfig, *, first: bool) -> None:
        super().__init__()
        self.region, self.patch = brick.region, brick.patch
        dim, inputs = config.dim, (1 if first else 2) * config.channels + 2
        sizes = DiTConfig(dim=dim, heads=config.heads, ffn_dim=4 * dim)
        self.patchify = nn.Conv2d(inputs, dim, brick.patch, brick.patch)
        self.register_buffer(
            "positions", grid_waves(brick.region // brick.patch, dim), persistent=False
        )
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(brick.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = zero_linear(dim, 2 * dim)
        self.head = zero_linear(dim, brick.patch**2 * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch features height width"],
        condition: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch channels height width"]:
        regions, rows, columns = cut(x, self.region)
        condition = condition.repeat_interleave(rows * columns, dim=0)
        y = self.patchify(regions).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            y = block(y, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        y = self.head(self.norm(y) * (1 + scale) + shift)
        return fold(y, self.region // self.patch, self.patch, rows, columns)


def cut(
    x: Float[Tensor, "batch features height width"], region: int
) -> tuple[Float[Tensor, "regions features region region"], int, int]:
    """Return the regions of images, row by row, and how many rows and columns of them there are."""
    rows, columns = x.shape[2] // region, x.shape[3] // region
    x = x.unflatten(3, (columns, region)).unflatten(2, (rows, region))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2), rows, columns


def fold(
    y: Float[Tensor, "regions tokens numbers"], side: int, patch: int, rows: int, columns: int
) -> Float[Tensor, "batch channels height width"]:
    """Lay out images of regions of patches; a patch holds rows, columns, channels."""
    y = y.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    y = y.unflatten(0, (-1, rows, columns))  # batch, two of regions, two of patches, two of pixels
    return y.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)


def places(x: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch 2 height width"]:
    """Return column and row of each pixel, from -1 to 1 over the whole image."""
    batch, _, height, width = x.shape
    columns, rows = (
        torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in (width, height)
    )
    grids = columns.expand(height, width), rows[:, None].expand(height, width)
    return torch.stack(grids).expand(batch, -1, -1, -1)


def denoise(
    estimate: Callable[[Tensor, Tensor], Tensor],
    noisy: Float[Tensor, "batch channels height width"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "... batch channels height width"]:
    """Return the clean image behind a noisy one.

    Scales are computed in double precision, outside of the model.

    Args:
        estimate: Takes a scaled image and its noise level; returns one estimate, or several in
            front, as the stacked estimates of all bricks.
        noisy: Image plus noise.
        sigma: Standard deviation of the noise.

    Source: Karras et al., 2022, arXiv:2206.00364, table 1 and equation 7.
    """
    s = sigma.double()[:, None, None, None]
    total = s.square() + SIGMA_DATA**2
    level = (sigma.double().log() / 4).to(noisy.dtype)
    z = estimate((noisy / total.sqrt()).to(noisy.dtype), level)
    kept, added = SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt()
    return (kept * noisy + added * z).to(noisy.dtype)
