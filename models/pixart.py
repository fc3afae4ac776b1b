"""PixArt-alpha: a diffusion transformer over latent patches that reads a text.

    x = x + gate * attention(norm(x) * (1 + scale) + shift)
    x = x + cross_attention(x, text)
    x = x + gate * down(gelu(up(norm(x) * (1 + scale) + shift)))

Where DiT has a layer in every block for shifts, scales and gates, here one layer serves all blocks
(adaLN-single), and a block only adds a table of its own. Attention over the text has no norm before
it and no gate behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PixArtConfig:
    """Sizes of a PixArt.

    Attributes:
        latent: Height and width of a latent image, a multiple of `patch`.
        patch: Height and width of a patch.
        channels: Channels of a latent image.
        text_dim: Width of a text token.
        dim: Width of the residual stream, a multiple of `heads`, of 3 and of 4.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        spacing: Distance of neighbouring patches in the fixed positions.
        sized: Whether resolution and aspect ratio of the image are inputs.

    Source: Chen et al., 2023, arXiv:2310.00426.
    """

    latent: int = 128
    patch: int = 2
    channels: int = 4
    text_dim: int = 4096
    dim: int = 1152
    heads: int = 16
    depth: int = 28
    ffn_dim: int = 4608
    spacing: float = 0.5
    sized: bool = True


PIXART_ALPHA_1024 = PixArtConfig()
PIXART_ALPHA_512 = PixArtConfig(latent=64, spacing=1.0, sized=False)
TOY = PixArtConfig(latent=8, text_dim=6, dim=12, heads=2, depth=3, ffn_dim=16)


class PixArt(nn.Module):
    """Patches, blocks steered by time, size and text, and a head that predicts noise, variance."""

    positions: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        dim, side = config.dim, config.latent // config.patch
        self.patchify = nn.Conv2d(config.channels, dim, config.patch, config.patch)
        positions = grid_waves(side, dim, config.spacing)
        self.register_buffer("positions", positions, persistent=False)
        self.time = condition_mlp(dim)
        self.resolution = condition_mlp(dim // 3) if config.sized else None
        self.aspect = condition_mlp(dim // 3) if config.sized else None
        self.modulation = nn.Linear(dim, 6 * dim)
        self.text_up = nn.Linear(config.text_dim, dim)
        self.text_down = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, config.patch**2 * 2 * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels side side"],
        text: Float[Tensor, "batch words text_dim"],
        mask: Bool[Tensor, "batch words"],
        time: Float[Tensor, " batch"],
        resolution: Float[Tensor, "batch 2"] | None = None,
        aspect: Float[Tensor, "batch 1"] | None = None,
    ) -> Float[Tensor, "batch 2*channels side side"]:
        """Predict noise and variance of a latent image.

        `mask` is True at words to look at. `time` is in steps, 0 to 1000. `resolution` is height
        and width in pixels, `aspect` height by width.
        """
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions  # [batch, seq, dim]
        condition = self.time(waves(time).to(x.dtype))
        if resolution is not None and self.resolution is not None:
            size = self.resolution(waves(resolution).to(x.dtype)).flatten(1)
            condition = condition + F.pad(size, (0, condition.shape[-1] - size.shape[-1]))
        if aspect is not None and self.aspect is not None:
            ratio = self.aspect(waves(aspect).to(x.dtype)).flatten(1)
            condition = condition + F.pad(ratio, (condition.shape[-1] - ratio.shape[-1], 0))
        parts = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))
        text = self.text_down(F.gelu(self.text_up(text), approximate="tanh"))
        for block in self.blocks:
            x = block(x, text, mask, parts)
        shift, scale = (self.table + condition[:, None]).chunk(2, dim=1)
        return unpatchify(self.head(self.norm(x) * (1 + scale) + shift), self.config.patch)

    def example_inputs(self, batch: int = 2, words: int = 5) -> tuple[Tensor, ...]:
        """Return a valid batch of latent images with text; every other text ends in padding."""
        config = self.config
        x = ramp(batch, config.channels, config.latent, config.latent)
        lengths = words - torch.arange(batch)[:, None] % 2 * (words // 4)
        text, mask = ramp(batch, words, config.text_dim), torch.arange(words) < lengths
        inputs = x, text, mask, torch.linspace(10, 500, batch)
        pixels = torch.full((batch, 2), 8.0 * config.latent)
        return (*inputs, pixels, torch.ones(batch, 1)) if config.sized else inputs


class Block(nn.Module):
    """Attention to the image, attention to the text, and a feed-forward network."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        dim = config.dim
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config)
        self.cross_attention = CrossAttention(config)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        text: Float[Tensor, "batch words dim"],
        mask: Bool[Tensor, "batch words"],
        parts: Float[Tensor, "batch 6 dim"],
    ) -> Float[Tensor, "batch seq dim"]:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.table + parts).chunk(6, dim=1)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift)
        x = x + self.cross_attention(x, text, mask)
        y = self.up(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.down(F.gelu(y, approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, config: PixArtConfig) -> None:
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


class CrossAttention(nn.Module):
    """Queries from the image; keys and values, from one layer, from the text."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.dim, 2 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        text: Float[Tensor, "batch words dim"],
        mask: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch seq dim"]:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(text).unflatten(-1, (2, self.heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)  # [batch, heads, words, head_dim] each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


def condition_mlp(dim: int) -> nn.Sequential:
    """Return the layers from the waves of one number to its share of the condition."""
    return nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))


def waves(value: Float[Tensor, "*shape"], width: int = 256) -> Float[Tensor, "*shape width"]:
    """Return cosines, then sines, of numbers at frequencies from 1 towards 1/10000."""
    exponents = torch.arange(width // 2, device=value.device) / (width // 2)
    angles = value[..., None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_waves(side: int, dim: int, spacing: float) -> Float[Tensor, "seq dim"]:
    """Return the fixed positions of a square grid: waves of the column, then of the row."""
    frequencies = 1e4 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = spacing * torch.arange(side)[:, None] * frequencies
    ends = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 2]
    columns, rows = ends.expand(side, -1, -1), ends[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)


def unpatchify(
    x: Float[Tensor, "batch seq features"], patch: int
) -> Float[Tensor, "batch channels side side"]:
    """Lay a square number of patches out as an image; a patch holds rows, columns, channels."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def ramp(*shape: int) -> Float[Tensor, "..."]:
    """Return numbers from -1 to 1."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
