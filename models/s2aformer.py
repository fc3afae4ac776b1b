"""S2AFormer: four stages of convolutions and strip attention, an image classifier.

x = x + local(x)        x = x + attention(norm(x))        x = x + ffn(norm(x))

Keys and values are cells of r x r pixels; queries and keys have one channel per head, so that the
scores of a head are an outer product. The convolution is what tells near pixels from far ones.

No code is published. Sizes, order and configurations are a reconstruction for this repository, and
not those of the authors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class S2AFormerConfig:
    """Sizes of an S2AFormer; each tuple has one entry per stage.

    Attributes:
        image: Height and width of an image in pixels, a multiple of 32.
        channels: Channels of an image.
        classes: Outputs of the head.
        widths: Width of the stream, a multiple of its heads.
        depths: Blocks.
        heads: Attention heads.
        reductions: A key stands for so many pixels squared; they divide the side of the stage.
        ffn_ratio: Hidden channels of a feed-forward network for each channel of the stream.
        qk_channels: Channels of a query and a key head.

    Source: Xu et al., 2025, arXiv:2505.22195 (the idea); reductions and widths follow PVTv2 (Wang
        et al., 2022, arXiv:2106.13797).
    """

    image: int = 224
    channels: int = 3
    classes: int = 1000
    widths: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    ffn_ratio: int = 4
    qk_channels: int = 1


RECONSTRUCTED_TINY = S2AFormerConfig()
RECONSTRUCTED_SMALL = S2AFormerConfig(widths=(64, 128, 320, 512), depths=(2, 2, 6, 2))
TOY = S2AFormerConfig(
    image=32, classes=5, widths=(4, 8), depths=(2, 2), heads=(1, 2), reductions=(2, 1), ffn_ratio=2
)


class S2AFormer(nn.Module):
    """Stem, stages, each behind a convolution that halves the sides, and head."""

    def __init__(self, config: S2AFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.widths)))
        self.norm = nn.LayerNorm(config.widths[-1])
        self.head = nn.Linear(config.widths[-1], config.classes)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        x = image
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))
        return logits

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of images."""
        shape = batch, self.config.channels, self.config.image, self.config.image
        return (torch.linspace(-1, 1, math.prod(shape)).reshape(shape),)


class Stage(nn.Module):
    """A convolution that makes the map smaller, and blocks on it."""

    def __init__(self, config: S2AFormerConfig, index: int) -> None:
        super().__init__()
        before = config.widths[index - 1] if index else config.channels
        kernel, stride = (3, 2) if index else (7, 4)
        width = config.widths[index]
        self.merge = nn.Conv2d(before, width, kernel, stride, padding=kernel // 2)
        self.blocks = nn.ModuleList(Block(config, index) for _ in range(config.depths[index]))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        x = self.merge(x)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    """Convolution, strip attention and feed-forward network, each beside a residual."""

    def __init__(self, config: S2AFormerConfig, index: int) -> None:
        super().__init__()
        dim, hidden = config.widths[index], config.widths[index] * config.ffn_ratio
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = StripSelfAttention(
            dim, config.heads[index], config.reductions[index], config.qk_channels
        )
        self.ffn_norm = nn.LayerNorm(dim)
        self.up = nn.Conv2d(dim, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.down = nn.Conv2d(hidden, dim, 1)

    def forward(
        self, x: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        x = x + self.local(x)
        x = x + self.attention(normed(self.attention_norm, x))
        hidden = self.depthwise(self.up(normed(self.ffn_norm, x)))
        result: Tensor = x + self.down(F.gelu(hidden))
        return result


class StripSelfAttention(nn.Module):
    """Attention of all pixels to cells, with thin queries and keys.

    Args:
        dim: Width of the stream.
        heads: Attention heads.
        reduction: Side of a cell in pixels.
        qk_channels: Channels of a query and a key head.
    """

    def __init__(self, dim: int, heads: int, reduction: int, qk_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * qk_channels)
        self.key = nn.Linear(dim, heads * qk_channels)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        tokens = x.flatten(2).transpose(1, 2)  # [batch, seq, dim]
        cells = self.norm(self.reduce(x).flatten(2).transpose(1, 2))  # [batch, cells, dim]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(tokens), self.key(cells), self.value(cells))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


def normed(
    norm: nn.LayerNorm, x: Float[Tensor, "batch dim height width"]
) -> Float[Tensor, "batch dim height width"]:
    """Return a map whose channels are normalised pixel by pixel."""
    result: Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return result
