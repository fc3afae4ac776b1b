"""Swin: a pre-norm image classifier that attends within windows and narrows in stages.

x = x + attention(norm(x))        x = x + down(gelu(up(norm(x))))

Every other block shifts its windows by half their side, so that neighbours meet. A stage ends by
merging 2 x 2 patches into one of twice the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin.

    Attributes:
        image: Height and width of an image in pixels. Every stage must hold whole windows.
        patch: Height and width of a patch in pixels.
        channels: Channels of an image.
        classes: Outputs of the head.
        dim: Width of the first stage; each further one has twice the width.
        depths: Blocks per stage.
        heads: Attention heads per stage.
        window: Height and width of a window in patches.
        ffn_ratio: Hidden neurons of a feed-forward network, as a multiple of its width.

    Source: Liu et al., 2021, arXiv:2103.14030.
    """

    image: int = 224
    patch: int = 4
    channels: int = 3
    classes: int = 1000
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    ffn_ratio: int = 4


SWIN_T = SwinConfig()
SWIN_S = SwinConfig(depths=(2, 2, 18, 2))
SWIN_B = SwinConfig(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
TOY = SwinConfig(
    image=16, patch=2, classes=5, dim=4, depths=(2, 4), heads=(1, 2), window=2, ffn_ratio=2
)


class Swin(nn.Module):
    """Patches, stages, final norm, mean over all patches, and head."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patchify = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.patch_norm = nn.LayerNorm(config.dim)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.depths)))
        width = config.dim << (len(config.depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)

    def forward(
        self, image: Float[Tensor, "batch channels pixels pixels"]
    ) -> Float[Tensor, "batch classes"]:
        x = self.patch_norm(self.patchify(image).movedim(1, -1))  # [batch, height, width, dim]
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=(1, 2)))
        return logits

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of images."""
        shape = batch, self.config.channels, self.config.image, self.config.image
        return (torch.linspace(-1, 1, math.prod(shape)).reshape(shape),)


class Stage(nn.Module):
    """Blocks with straight and shifted windows in turn, then a merge unless it is the last."""

    def __init__(self, config: SwinConfig, index: int) -> None:
        super().__init__()
        dim, side = config.dim << index, config.image // config.patch >> index
        window = min(config.window, side)
        shift = window // 2 if side > window else 0
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_ratio * dim, config.heads[index], side, window, shift * (i % 2))
            for i in range(config.depths[index])
        )
        last = index == len(config.depths) - 1
        self.merge: nn.Module = nn.Identity() if last else PatchMerging(dim)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Tensor:
        for block in self.blocks:
            x = block(x)
        merged: Tensor = self.merge(x)
        return merged


class PatchMerging(nn.Module):
    """Turns 2 x 2 patches into one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height//2 width//2 2*dim"]:
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [batch, rows, 2, columns, 2, dim]
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # a square's left column comes first
        reduced: Tensor = self.reduce(self.norm(x))
        return reduced


class Block(nn.Module):
    """Window attention and feed-forward network, each behind its norm and beside a residual."""

    def __init__(
        self, dim: int, ffn_dim: int, heads: int, side: int, window: int, shift: int
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, side, window, shift)
        self.ffn_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class WindowAttention(nn.Module):
    """Attention among the patches of a window, with a learned bias for each relative position.

    Shifting rolls the image, so a window at the edge holds parts that do not belong together; a
    mask keeps them apart.
    """

    offsets: Tensor
    mask: Tensor

    def __init__(self, dim: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.register_buffer("offsets", relative_offsets(window), persistent=False)
        if shift:
            self.register_buffer("mask", shift_mask(side, window, shift), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        bias = self.bias[self.offsets].permute(2, 0, 1)  # [heads, seq, seq]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
            bias = bias + self.mask[:, None]  # [windows, heads, seq, seq]
            bias = bias.repeat(x.shape[0], 1, 1, 1)  # [batch * windows, heads, seq, seq]
        qkv = self.qkv(split_windows(x, self.window)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [batch * windows, heads, seq, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = self.out(y.transpose(1, 2).flatten(2))
        x = join_windows(y, self.window, x.shape[1], x.shape[2])
        return x.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else x


def split_windows(
    x: Shaped[Tensor, "batch height width dim"], window: int
) -> Shaped[Tensor, "all_windows seq dim"]:
    """Return the windows of each image, row by row."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(
    x: Float[Tensor, "all_windows seq dim"], window: int, height: int, width: int
) -> Float[Tensor, "batch height width dim"]:
    """Undo `split_windows`."""
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, height // window, width // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_offsets(window: int) -> Int[Tensor, "seq seq"]:
    """Number the relative positions: which row of the bias table holds for query and key."""
    places = torch.arange(window)
    apart = places[:, None] - places + window - 1  # [query, key] along one side
    rows = apart[:, None, :, None] * (2 * window - 1)
    return (rows + apart[None, :, None, :]).flatten(2).flatten(0, 1)


def shift_mask(side: int, window: int, shift: int) -> Float[Tensor, "windows seq seq"]:
    """Return 0 where query and key were neighbours before the roll, and -100 elsewhere."""
    places = torch.arange(side)
    band = (places >= side - window).long() + (places >= side - shift).long()
    region = split_windows((3 * band[:, None] + band)[None, :, :, None], window)[
        :, :, 0
    ]  # [windows, seq]
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
