"""SD3: an MM-DiT of joint blocks over a grid of fixed positions; the last block ends the text.

The condition holds time and pooled text. Joint blocks stand in `mmdit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .mmdit import JointBlock, condition_mlp, modulated_norm, ramp, time_waves


@dataclass(frozen=True)
class SD3Config:
    """Sizes of an SD3.

    Attributes:
        latent: Height and width of a latent image as in `example_inputs`; others will do.
        patch: Height and width of a patch.
        channels: Channels of a latent image.
        text_dim: Width of a text token.
        pooled_dim: Width of the pooled text.
        dim: Width of the residual stream, a multiple of `heads` and of 4.
        heads: Attention heads.
        depth: Joint blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        table: Height and width of the position table; an image takes a piece out of its middle.
        spacing: Distance of neighbours in the table.

    Source: Esser et al., 2024, arXiv:2403.03206.
    """

    latent: int = 128
    patch: int = 2
    channels: int = 16
    text_dim: int = 4096
    pooled_dim: int = 2048
    dim: int = 1536
    heads: int = 24
    depth: int = 24
    ffn_dim: int = 6144
    table: int = 192
    spacing: float = 1 / 3


SD3_MEDIUM = SD3Config()
TOY_SD3 = SD3Config(
    latent=8, channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, depth=4, ffn_dim=24, table=6
)


class SD3(nn.Module):
    """Patches, joint blocks, and a head on the image."""

    positions: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patchify = nn.Conv2d(config.channels, dim, config.patch, config.patch)
        self.register_buffer("positions", grid_waves(config.table, dim, config.spacing))
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time = condition_mlp(256, dim)
        self.pooled = condition_mlp(config.pooled_dim, dim)
        self.blocks = nn.ModuleList(
            JointBlock(dim, config.heads, config.ffn_dim, ends_text=i == config.depth - 1)
            for i in range(config.depth)
        )
        self.norm = modulated_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch**2 * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        text: Float[Tensor, "batch words text_dim"],
        pooled: Float[Tensor, "batch pooled_dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Predict the velocity of a latent image. `time` runs from 1, noise, to 0."""
        patches = self.patchify(x)
        height, width = patches.shape[2:]
        top, left = (self.config.table - height) // 2, (self.config.table - width) // 2
        positions = self.positions[top : top + height, left : left + width]
        image = (patches.movedim(1, -1) + positions).flatten(1, 2)  # [batch, patches, dim]
        condition = self.time(time_waves(time).to(x.dtype)) + self.pooled(pooled)
        text = self.text_in(text)
        for block in self.blocks:
            image, text = block(image, text, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        y = self.head(self.norm(image) * (1 + scale) + shift)
        y = y.unflatten(-1, (self.config.patch, self.config.patch, -1))
        y = y.unflatten(1, (height, width))  # [batch, rows, columns, patch, patch, channels]
        velocity: Tensor = y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity

    def example_inputs(
        self, batch: int = 2, words: int = 5
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a valid batch of latent images with text."""
        config = self.config
        x = ramp(batch, config.channels, config.latent, config.latent)
        text, pooled = ramp(batch, words, config.text_dim), ramp(batch, config.pooled_dim)
        return x, text, pooled, torch.linspace(0.25, 1, batch)


def grid_waves(side: int, dim: int, spacing: float) -> Float[Tensor, "side side dim"]:
    """Return the fixed positions of a square grid: waves of the column, then of the row."""
    frequencies = 1e4 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = spacing * torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 2]
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=-1)
