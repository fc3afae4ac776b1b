"""StyleSwin: a generator of images that attends within windows, straight ones and shifted at once.

    x = x + out([attention in windows, first half of the heads; in shifted windows, second half])
    x = x + down(gelu(up(norm(x))))

Norms take mean and deviation of each channel over the image away and put those on that the style
asks for. The image grows from 4 x 4 by doubling; each size adds its colours to those of the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .swin import join_windows, relative_offsets, shift_mask, split_windows


@dataclass(frozen=True)
class StyleSwinConfig:
    """Sizes of a StyleSwin.

    Attributes:
        image: Height and width of an image in pixels, a power of two from 4 on.
        multiplier: Factor on the widths from `wide` pixels on.
        dim: Width of the small sizes.
        wide: The first size that is narrower: `dim / 2 * multiplier`, half of that at each further.
        head_dim: Width of an attention head; four heads at least.
        depth: Blocks per size.
        window: Height and width of a window; images of up to this size are one window.
        ffn_ratio: Hidden neurons of a feed-forward network, as a multiple of its width.
        style_dim: Width of noise and style.
        style_depth: Layers from noise to style.

    Source: Zhang et al., 2022, arXiv:2112.10762.
    Differs: layers of the style have the weights that equalised learning rates make of the released
        ones; how they are trained is left out.
    """

    image: int = 1024
    multiplier: int = 1
    dim: int = 512
    wide: int = 64
    head_dim: int = 32
    depth: int = 2
    window: int = 8
    ffn_ratio: int = 4
    style_dim: int = 512
    style_depth: int = 8

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes the image grows through."""
        return tuple(4 << i for i in range(int(math.log2(self.image)) - 1))

    def width(self, size: int) -> int:
        """Return the channels at one size."""
        return self.dim if size < self.wide else self.dim * self.multiplier * self.wide // 2 // size

    def heads(self, size: int) -> int:
        """Return the attention heads at one size."""
        return max(self.width(size) // self.head_dim, 4)


STYLESWIN_256 = StyleSwinConfig(image=256, multiplier=2)
STYLESWIN_256_NARROW = StyleSwinConfig(image=256)
STYLESWIN_512 = StyleSwinConfig(image=512)
STYLESWIN_1024 = StyleSwinConfig()
TOY = StyleSwinConfig(
    image=8, dim=16, wide=16, head_dim=4, window=4, ffn_ratio=2, style_dim=8, style_depth=2
)


class StyleSwin(nn.Module):
    """Style, a learned 4 x 4 image, and stages that double it, each adding to the colours."""

    def __init__(self, config: StyleSwinConfig) -> None:
        super().__init__()
        self.config = config
        self.style = nn.ModuleList(
            nn.Linear(config.style_dim, config.style_dim) for _ in range(config.style_depth)
        )
        self.start = nn.Parameter(torch.randn(1, config.width(4), 4, 4))
        self.stages = nn.ModuleList(Stage(config, size) for size in config.sizes)

    def forward(
        self, noise: Float[Tensor, "batch style"]
    ) -> Float[Tensor, "batch 3 pixels pixels"]:
        """Make an image of noise."""
        style = noise * (noise.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.style:
            style = math.sqrt(2) * F.leaky_relu(layer(style), 0.2)
        x = self.start.expand(noise.shape[0], -1, -1, -1).flatten(2).transpose(1, 2)
        colours: Tensor | None = None
        for stage in self.stages:
            x, colours = stage(x, style, colours)
        assert colours is not None
        return colours

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of noise."""
        return (torch.arange(batch * self.config.style_dim).sin().view(batch, -1),)


class Stage(nn.Module):
    """Blocks at one size, the doubling behind them unless it is the last, and its colours."""

    def __init__(self, config: StyleSwinConfig, size: int) -> None:
        super().__init__()
        width = config.width(size)
        self.blocks = nn.ModuleList(Block(config, size) for _ in range(config.depth))
        last = size == config.image
        self.grow = None if last else Upsample(width, config.width(2 * size), size)
        self.colour = nn.Conv2d(width if last else config.width(2 * size), 3, 1)
        self.last = last

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        style: Float[Tensor, "batch style"],
        colours: Float[Tensor, "batch 3 side side"] | None,
    ) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x, style)
        if self.grow is not None:
            x = self.grow(x)
        side = math.isqrt(x.shape[1])
        new = self.colour(x.transpose(1, 2).unflatten(2, (side, side)))
        if colours is None:
            return x, new
        return x, new + (colours if self.last else smooth_double(colours))


class Block(nn.Module):
    """Double attention and feed-forward network, each behind its styled norm, beside a residual."""

    def __init__(self, config: StyleSwinConfig, size: int) -> None:
        super().__init__()
        dim = config.width(size)
        self.attention_norm = StyledNorm(dim, config.style_dim)
        self.attention = DoubleAttention(dim, config.heads(size), size, min(config.window, size))
        self.ffn_norm = StyledNorm(dim, config.style_dim)
        self.up = nn.Linear(dim, config.ffn_ratio * dim)
        self.down = nn.Linear(config.ffn_ratio * dim, dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], style: Float[Tensor, "batch style"]
    ) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x, style))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x, style))))


class StyledNorm(nn.Module):
    """Instance norm whose factors and shifts come from the style (AdaIN)."""

    def __init__(self, dim: int, style_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(style_dim, 2 * dim)
        with torch.no_grad():
            self.modulation.bias.copy_(torch.cat([torch.ones(dim), torch.zeros(dim)]))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], style: Float[Tensor, "batch style"]
    ) -> Float[Tensor, "batch seq dim"]:
        factor, shift = self.modulation(style)[:, None].chunk(2, dim=-1)
        normed = F.instance_norm(x.transpose(1, 2), eps=1e-5).transpose(1, 2)
        return factor * normed + shift


class DoubleAttention(nn.Module):
    """Attention of the first half of the channels in windows, of the second in shifted ones."""

    def __init__(self, dim: int, heads: int, side: int, window: int) -> None:
        super().__init__()
        self.side = side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        shift = window // 2 if side > window else 0
        self.branches = nn.ModuleList(
            WindowCore(heads // 2, side, window, shift) for shift in (0, shift)
        )

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, 2, -1)).unflatten(1, (self.side, self.side))
        halves = qkv.unbind(-2)  # [batch, side, side, 3, dim / 2] each
        y = [branch(half) for branch, half in zip(self.branches, halves, strict=True)]
        merged: Tensor = self.out(torch.cat(y, dim=-1).flatten(1, 2))
        return merged


class WindowCore(nn.Module):
    """Attention among the pixels of a window, with a learned bias for each relative position."""

    offsets: Tensor
    mask: Tensor

    def __init__(self, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.register_buffer("offsets", relative_offsets(window), persistent=False)
        if shift:
            self.register_buffer("mask", shift_mask(side, window, shift), persistent=False)

    def forward(
        self, qkv: Float[Tensor, "batch side side 3 dim"]
    ) -> Float[Tensor, "batch side side dim"]:
        side = qkv.shape[1]
        bias = self.bias[self.offsets].permute(2, 0, 1)  # [heads, cells, cells]
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), dims=(1, 2))
            bias = bias + self.mask[:, None]  # [windows, heads, cells, cells]
            bias = bias.repeat(qkv.shape[0], 1, 1, 1)
        windows = split_windows(qkv.flatten(3), self.window).unflatten(-1, (3, self.heads, -1))
        q, k, v = windows.transpose(1, 3).unbind(2)  # [batch * windows, heads, cells, head_dim]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = join_windows(y.transpose(1, 2).flatten(2), self.window, side, side)
        return x.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else x


class Upsample(nn.Module):
    """Doubles the image, narrows it, and adds positions, of which there are none at first."""

    positions: Tensor

    def __init__(self, dim: int, narrow: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, narrow, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))
        self.register_buffer("positions", image_waves(2 * side, narrow), persistent=False)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch 4*seq narrow"]:
        image = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
        wide = self.reduce(self.norm(image.flatten(2).transpose(1, 2)))
        return wide + self.strength * self.positions


def smooth_double(x: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 2*side 2*side"]:
    """Double an image, with the weights 1, 3, 3, 1 along each axis."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 4
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 4, 4)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def image_waves(side: int, dim: int) -> Float[Tensor, "seq dim"]:
    """Return the fixed positions of a square image: waves of the column, then of the row."""
    steps = torch.arange(dim // 4) / max(dim // 4 - 1, 1)
    angles = torch.arange(1, side + 1)[:, None] * 1e4**-steps
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 2]
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)
