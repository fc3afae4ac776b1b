"""DLGSANet: makes an image larger by convolutions that pixels choose and attention of channels.

x = x + dynamic(norm(x))    x = x + ffn(norm(x))    x = x + sparse(norm(x))    x = x + ffn(norm(x))

    dynamic   a 7 x 7 depth-wise convolution whose weights every pixel makes, for groups of channels
    sparse    relu(q @ k.T * temperature) @ v, where a token is a channel and its features are all
              pixels; queries and keys have length one, and there is no softmax

Lengths are sums over pixels, so what was trained on small images is used on tiles of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL = 7
MEAN = (0.4488, 0.4371, 0.4040)  # of the images it was trained on
Map = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class DLGSANetConfig:
    """Sizes of a DLGSANet.

    Attributes:
        dim: Channels of the stream, a multiple of `heads` and of `group_channels`.
        groups: Groups of blocks.
        depth: Blocks of a group.
        scale: Factor of the image's sides.
        heads: Attention heads.
        group_channels: Channels that share the weights of a dynamic convolution.
        squeeze: Channels of the stream for each channel that those weights are made of.
        ffn_ratio: Hidden channels of a feed-forward network for each channel of the stream.
        activation: What is made of the scores of channels: `relu`, or `softmax` as in Restormer.
        tile: Side of the tiles that channels attend to each other in; None for the whole image.
        image: Height and width of the example in pixels.

    Source: Li et al., 2023, arXiv:2301.02031, with its released code; Chu et al., 2022,
        arXiv:2112.04491 (tiles).
    """

    dim: int = 48
    groups: int = 4
    depth: int = 3
    scale: int = 4
    heads: int = 6
    group_channels: int = 6
    squeeze: int = 4
    ffn_ratio: int = 2
    activation: str = "relu"
    tile: int | None = None
    image: int = 48


DLGSANET_TINY_X2 = DLGSANetConfig(groups=3, scale=2)
DLGSANET_TINY_X4 = DLGSANetConfig(groups=3)
DLGSANET_LIGHT_X2 = DLGSANetConfig(scale=2)
DLGSANET_LIGHT_X3 = DLGSANetConfig(scale=3)
DLGSANET_LIGHT_X4 = DLGSANetConfig()
DLGSANET_X2 = DLGSANetConfig(dim=90, groups=6, depth=4, scale=2)
DLGSANET_X3 = DLGSANetConfig(dim=90, groups=6, depth=4, scale=3)
DLGSANET_X4 = DLGSANetConfig(dim=90, groups=6, depth=4)
TOY = DLGSANetConfig(
    dim=8, groups=1, depth=2, scale=2, heads=2, group_channels=4, squeeze=2, image=8
)


class DLGSANet(nn.Module):
    """Groups of blocks between convolutions, and pixels dealt out at the end."""

    mean: Tensor

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.first = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.groups = nn.ModuleList(Group(config) for _ in range(config.groups))
        self.body = nn.Conv2d(dim, dim, 3, padding=1)
        self.last = nn.Conv2d(dim, 3 * config.scale**2, 3, padding=1)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 scale*height scale*width"]:
        x = self.first(image - self.mean)
        y = x
        for group in self.groups:
            y = group(y)
        return F.pixel_shuffle(self.last(x + self.body(y)), self.config.scale) + self.mean

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of images."""
        shape = batch, 3, self.config.image, self.config.image
        return (torch.linspace(0, 1, math.prod(shape)).reshape(shape),)


class Group(nn.Module):
    """Blocks and a convolution beside a residual."""

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.conv = nn.Conv2d(config.dim, config.dim, 3, padding=1)

    def forward(self, x: Map) -> Map:
        y = x
        for block in self.blocks:
            y = block(y)
        result: Tensor = x + self.conv(y)
        return result


class Block(nn.Module):
    """Dynamic convolution and channel attention, each with a feed-forward network behind it."""

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.ffn_ratio * config.dim
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.dynamic = DynamicConv(dim, config.group_channels, config.squeeze)
        self.attention = ChannelAttention(config)
        self.ffns = nn.ModuleList(GatedConv(dim, hidden) for _ in range(2))

    def forward(self, x: Map) -> Map:
        parts = self.dynamic, self.ffns[0], self.attention, self.ffns[1]
        for norm, part in zip(self.norms, parts, strict=True):
            x = x + part(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x


class DynamicConv(nn.Module):
    """A depth-wise convolution with weights of its own at every pixel, between two layers."""

    def __init__(self, dim: int, group_channels: int, squeeze: int) -> None:
        super().__init__()
        self.groups, narrow = dim // group_channels, dim // squeeze
        self.inner = nn.Conv2d(dim, dim, 1, bias=False)
        self.squeeze = nn.Conv2d(dim, narrow, 1)
        self.look = nn.Conv2d(narrow, narrow, KERNEL, padding=KERNEL // 2, groups=narrow)
        self.weights = nn.Conv2d(narrow, KERNEL**2 * self.groups, 1)
        self.out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Map) -> Map:
        x = self.inner(x)
        made = self.weights(self.look(self.squeeze(x))).unflatten(1, (self.groups, KERNEL, KERNEL))
        result: Tensor = self.out(dynamic_conv(x, made))
        return result


class ChannelAttention(nn.Module):
    """Attention whose tokens are the channels of a head."""

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.activation, self.tile = config.heads, config.activation, config.tile
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.look = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Map) -> Map:
        qkv = self.look(self.qkv(x))
        found = self.attend(qkv) if self.tile is None else tiled(self.attend, qkv, self.tile)
        result: Tensor = self.out(found)
        return result

    def attend(self, qkv: Map) -> Map:
        """Attend within one image or tile."""
        parts = qkv.unflatten(1, (3, self.heads, -1)).flatten(4)  # [batch, 3, heads, width, pixels]
        q, k, v = parts.unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        weights = F.relu(scores) if self.activation == "relu" else scores.softmax(-1)
        return (weights @ v).flatten(1, 2).unflatten(2, qkv.shape[2:])


class GatedConv(nn.Module):
    """A feed-forward network with a depth-wise convolution, one half of it a gate."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.look = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.down = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Map) -> Map:
        gate, value = self.look(self.up(x)).chunk(2, dim=1)
        result: Tensor = self.down(F.gelu(gate) * value)
        return result


def dynamic_conv(x: Map, weight: Float[Tensor, "batch groups k k height width"]) -> Map:
    """Return sums over a neighbourhood, weighted pixel by pixel; zeros lie beyond the border.

    One product per place of the kernel: what the kernel sees is never laid out in memory.
    """
    side, (height, width) = weight.shape[2], x.shape[2:]
    grouped = x.unflatten(1, (weight.shape[1], -1))
    padded = F.pad(grouped, (side // 2,) * 4)
    y = torch.zeros_like(grouped)
    for row in range(side):
        for column in range(side):
            seen = padded[..., row : row + height, column : column + width]
            y = y + weight[:, :, None, row, column] * seen
    return y.flatten(1, 2)


def tiled(attend: Callable[[Tensor], Tensor], x: Map, tile: int) -> Map:
    """Return the mean of what overlapping tiles give; one tile where the image is no larger."""
    height, width = (min(tile, side) for side in x.shape[2:])
    y, often = None, x.new_zeros(x.shape[2:])
    for top in starts(x.shape[2], height):
        for left in starts(x.shape[3], width):
            rows, columns = slice(top, top + height), slice(left, left + width)
            part = attend(x[:, :, rows, columns])
            y = part.new_zeros(*part.shape[:2], *x.shape[2:]) if y is None else y
            y[:, :, rows, columns] += part
            often[rows, columns] += 1
    assert y is not None
    return y / often


def starts(side: int, tile: int) -> list[int]:
    """Return where tiles begin: as few as cover the side, the last one at its end."""
    count = -(-side // tile)
    step = -(-(side - tile) // max(count - 1, 1))
    return [min(i * step, side - tile) for i in range(count)]
