"""ViT: a pre-norm image classifier over square patches.

x = x + attention(norm(x))        x = x + down(gelu(up(norm(x))))

A class token stands before the patches, and the head reads nothing but what becomes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT.

    Attributes:
        image: Height and width of an image in pixels, a multiple of `patch`.
        patch: Height and width of a patch in pixels.
        channels: Channels of an image.
        classes: Outputs of the head.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.

    Source: Dosovitskiy et al., 2021, arXiv:2010.11929. DeiT without distillation (Touvron et al.,
        2021, arXiv:2012.12877) has the same structure.
    """

    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    dim: int = 768
    heads: int = 12
    depth: int = 12
    ffn_dim: int = 3072


VIT_TI16 = ViTConfig(dim=192, heads=3, ffn_dim=768)
VIT_B16 = ViTConfig()
VIT_L16 = ViTConfig(dim=1024, heads=16, depth=24, ffn_dim=4096)
DEIT_S16 = ViTConfig(dim=384, heads=6, ffn_dim=1536)
TOY = ViTConfig(image=8, patch=4, classes=5, dim=8, heads=2, depth=3, ffn_dim=12)


class ViT(nn.Module):
    """Patches, class token and positions, blocks, final norm and head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patchify = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        count = 1 + (config.image // config.patch) ** 2
        self.positions = nn.Parameter(0.02 * torch.randn(1, count, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        patches = self.patchify(image).flatten(2).transpose(1, 2)  # [batch, seq - 1, dim]
        first = self.class_token.expand(image.shape[0], -1, -1)
        x = torch.cat((first, patches), dim=1) + self.positions  # [batch, seq, dim]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits

    def example_inputs(self, batch: int = 2) -> tuple[Tensor]:
        """Return a valid batch of images."""
        shape = batch, self.config.channels, self.config.image, self.config.image
        return (torch.linspace(-1, 1, math.prod(shape)).reshape(shape),)


class Block(nn.Module):
    """Attention and feed-forward network, each behind its norm and beside a residual."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [batch, seq, 3, heads, head_dim]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [batch, heads, seq, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged
