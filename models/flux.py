"""FLUX: an MM-DiT of joint blocks, then of single blocks in which text and image are one sequence.

    single block   x = x + gate * down([attention(x), gelu(up(x))])      x: [text, image]

In a single block attention and feed-forward network run side by side, into one matrix. Positions
are rotary, queries and keys normalized per head. The condition holds time, guidance and pooled
text. Joint blocks stand in `mmdit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .mmdit import (
    JointBlock,
    Rotary,
    SplitHeads,
    attend,
    condition_mlp,
    modulated_norm,
    ramp,
    time_waves,
)


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.

    Attributes:
        channels: Numbers per image token, a 2 x 2 patch of the latent image.
        text_dim: Width of a text token.
        pooled_dim: Width of the pooled text.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        double_depth: Joint blocks, which come first.
        single_depth: Single blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        axes: Rotated numbers of a head per axis of a position; they add up to a head.
        theta: Base of the rotation frequencies.
        guidance: Whether the guidance scale is an input.

    Source: Black Forest Labs, 2024, github.com/black-forest-labs/flux.
    """

    channels: int = 64
    text_dim: int = 4096
    pooled_dim: int = 768
    dim: int = 3072
    heads: int = 24
    double_depth: int = 19
    single_depth: int = 38
    ffn_dim: int = 12288
    axes: tuple[int, ...] = (16, 56, 56)
    theta: float = 1e4
    guidance: bool = True


FLUX_1_DEV = FluxConfig()
FLUX_1_SCHNELL = FluxConfig(guidance=False)
TOY_FLUX = FluxConfig(
    channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, double_depth=3, single_depth=3,
    ffn_dim=24, axes=(2, 2, 4),
)  # fmt: skip


class Flux(nn.Module):
    """Joint blocks, single blocks, and a head on the image."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, ffn_dim = config.dim, config.heads, config.ffn_dim
        self.image_in = nn.Linear(config.channels, dim)
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time = condition_mlp(256, dim)
        self.guidance = condition_mlp(256, dim) if config.guidance else None
        self.pooled = condition_mlp(config.pooled_dim, dim)
        self.double_blocks = nn.ModuleList(
            JointBlock(dim, heads, ffn_dim, qk_norm=True) for _ in range(config.double_depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(dim, heads, ffn_dim) for _ in range(config.single_depth)
        )
        self.norm = modulated_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.channels)

    def forward(
        self,
        image: Float[Tensor, "batch patches channels"],
        text: Float[Tensor, "batch words text_dim"],
        pooled: Float[Tensor, "batch pooled_dim"],
        time: Float[Tensor, " batch"],
        places: Float[Tensor, "patches axes"],
        guidance: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch patches channels"]:
        """Predict the velocity of an image.

        `time` runs from 1, noise, to 0. `places` are (0, row, column) of every patch.
        """
        condition = self.time(time_waves(time).to(image.dtype)) + self.pooled(pooled)
        if self.guidance is not None and guidance is not None:
            condition = condition + self.guidance(time_waves(guidance).to(image.dtype))
        image, text, words = self.image_in(image), self.text_in(text), text.shape[1]
        places = torch.cat((places.new_zeros(words, places.shape[1]), places))
        rotary = rotations(places, self.config.axes, self.config.theta)
        for block in self.double_blocks:
            image, text = block(image, text, condition, rotary)
        x = torch.cat((text, image), dim=1)  # [batch, seq, dim]
        for block in self.single_blocks:
            x = block(x, condition, rotary)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        velocity: Tensor = self.head(self.norm(x[:, words:]) * (1 + scale) + shift)
        return velocity

    def example_inputs(
        self, batch: int = 2, rows: int = 3, columns: int = 4, words: int = 5
    ) -> tuple[Tensor, ...]:
        """Return a valid batch of images, `rows` x `columns` patches each, with text."""
        config = self.config
        grid = torch.arange(float(rows)), torch.arange(float(columns))
        places = torch.cartesian_prod(torch.zeros(1), *grid)
        image, text = (
            ramp(batch, rows * columns, config.channels),
            ramp(batch, words, config.text_dim),
        )
        rest = ramp(batch, config.pooled_dim), torch.linspace(0.25, 1, batch), places
        return image, text, *rest, *([torch.linspace(3.5, 4, batch)] if config.guidance else [])


class SingleBlock(nn.Module):
    """Attention and feed-forward network side by side, from one matrix into another."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.sizes = 3 * dim, ffn_dim
        self.modulation = nn.Linear(dim, 3 * dim)
        self.norm = modulated_norm(dim)
        self.qkv_up = nn.Linear(dim, 3 * dim + ffn_dim)
        self.split = SplitHeads(heads, dim // heads, qk_norm=True)
        self.out_down = nn.Linear(dim + ffn_dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        condition: Float[Tensor, "batch dim"],
        rotary: Rotary,
    ) -> Float[Tensor, "batch seq dim"]:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        y = self.qkv_up(self.norm(x) * (1 + scale) + shift)
        qkv, hidden = y.split(self.sizes, dim=-1)
        q, k, v = self.split(qkv)
        hidden = F.gelu(hidden, approximate="tanh")
        return x + gate * self.out_down(torch.cat((attend(q, k, v, rotary), hidden), dim=-1))


def rotations(
    places: Float[Tensor, "seq axes"], axes: tuple[int, ...], theta: float
) -> tuple[Float[Tensor, "seq half"], Float[Tensor, "seq half"]]:
    """Return cosines and sines of the angles; each axis turns its own share of a head."""
    angles = torch.cat(
        [
            place[:, None] * theta ** -(torch.arange(0, width, 2, device=place.device) / width)
            for place, width in zip(places.float().unbind(-1), axes, strict=True)
        ],
        dim=-1,
    )
    return angles.cos(), angles.sin()
