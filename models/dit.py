"""DiT: a diffusion transformer over latent patches, steered by adaLN-Zero.

x = x + gate * attention(norm(x) * (1 + scale) + shift)        and the same with down(gelu(up(.)))

Shift, scale and gate come from one vector, the sum of time step and class; each block draws its
own six from it. They start at zero, so that a fresh block passes its input on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT.

    Attributes:
        latent: Height and width of a latent image, a multiple of `patch`.
        patch: Height and width of a patch.
        channels: Channels of a latent image.
        classes: Classes; one more label stands for none.
        dim: Width of the residual stream, a multiple of `heads` and of 4.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.

    Source: Peebles and Xie, 2023, arXiv:2212.09748.
    Differs: the fixed positions are a buffer, where the released code has a frozen parameter; its
        counts (675,129,632 for XL/2) are larger by `dim` times the number of patches.
    """

    latent: int = 32
    patch: int = 2
    channels: int = 4
    classes: int = 1000
    dim: int = 1152
    heads: int = 16
    depth: int = 28
    ffn_dim: int = 4608


DIT_S2 = DiTConfig(dim=384, heads=6, depth=12, ffn_dim=1536)
DIT_B2 = DiTConfig(dim=768, heads=12, depth=12, ffn_dim=3072)
DIT_L2 = DiTConfig(dim=1024, heads=16, depth=24, ffn_dim=4096)
DIT_XL2 = DiTConfig()
TOY = DiTConfig(latent=8, classes=5, dim=8, heads=2, depth=3, ffn_dim=12)


class DiT(nn.Module):
    """Patches, blocks steered by time and class, and a head that predicts noise and variance."""

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, side = config.dim, config.latent // config.patch
        self.patchify = nn.Conv2d(config.channels, dim, config.patch, config.patch)
        self.register_buffer("positions", grid_waves(side, dim), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(config.classes + 1, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = zero_linear(dim, 2 * dim)
        self.head = zero_linear(dim, config.patch**2 * 2 * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels side side"],
        time: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch 2*channels side side"]:
        """Predict noise and variance of a latent image.

        `time` is in steps, 0 to 1000; label `classes` stands for none.
        """
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions  # [batch, seq, dim]
        condition = self.time(time_waves(time, 256).to(x.dtype)) + self.labels(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return unpatchify(self.head(self.norm(x) * (1 + scale) + shift), self.config.patch)

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Return a valid batch of latent images at different times; every other has no class."""
        shape = batch, self.config.channels, self.config.latent, self.config.latent
        x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        labels = torch.arange(batch) % 2 * self.config.classes
        return x, torch.linspace(10, 500, batch), labels


class Block(nn.Module):
    """Attention and feed-forward network, each modulated, gated and beside a residual."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = zero_linear(config.dim, 6 * config.dim)
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        parts = self.modulation(F.silu(condition))[:, None]  # [batch, 1, 6 * dim]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts.chunk(6, dim=-1)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift)
        y = self.up(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.down(F.gelu(y, approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from one layer."""

    def __init__(self, config: DiTConfig) -> None:
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


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer that starts at zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def unpatchify(
    x: Float[Tensor, "batch seq features"], patch: int
) -> Float[Tensor, "batch channels side side"]:
    """Lay a square number of patches out as an image; a patch holds rows, columns, channels."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def time_waves(time: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Return cosines, then sines, of the time at frequencies from 1 towards 1/10000."""
    exponents = torch.arange(width // 2, device=time.device) / (width // 2)
    angles = time[:, None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_waves(side: int, dim: int) -> Float[Tensor, "seq dim"]:
    """Return the fixed positions of a square grid: waves of the column, then of the row."""
    angles = torch.arange(side)[:, None] * 1e4 ** -(torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 2]
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)
