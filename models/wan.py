"""Wan 2.1: a video diffusion transformer that reads a text.

    x = x + gate * attention(norm(x) * (1 + scale) + shift)
    x = x + cross_attention(norm(x), text)
    x = x + gate * down(gelu(up(norm(x) * (1 + scale) + shift)))

One layer gives shifts, scales and gates to all blocks, and a block adds a table of its own.
Queries and keys are normalized over their full width, before they are split into heads, and turned
by frame, row and column. Attention over the text has a norm with weights and no gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [seq, half] each


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan.

    Attributes:
        patch: Frames, height and width of a patch.
        channels: Channels of a latent video.
        text_dim: Width of a text token.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads of even width, at least 6.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        theta: Base of the rotation frequencies.

    Source: Wan Team, 2025, arXiv:2503.20314, text to video.
    Differs: norms and modulation run in the type of the model; the released code casts to fp32.
    """

    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 16
    text_dim: int = 4096
    dim: int = 5120
    heads: int = 40
    depth: int = 40
    ffn_dim: int = 13824
    theta: float = 1e4


WAN_2_1_1_3B = WanConfig(dim=1536, heads=12, depth=30, ffn_dim=8960)
WAN_2_1_14B = WanConfig()
TOY = WanConfig(channels=4, text_dim=6, dim=16, heads=2, depth=3, ffn_dim=24)


class Wan(nn.Module):
    """Patches of frames, blocks steered by time and text, and a head."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patchify = nn.Conv3d(config.channels, dim, config.patch, config.patch)
        self.text_up = nn.Linear(config.text_dim, dim)
        self.text_down = nn.Linear(dim, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, math.prod(config.patch) * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels frames height width"],
        text: Float[Tensor, "batch words text_dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Predict the velocity of a latent video. `time` is in steps, from 1000, noise, to 0."""
        patches = self.patchify(x)
        grid = patches.shape[2:]  # frames, rows, columns
        rotary = rotations(grid, self.config.dim // self.config.heads, self.config.theta, x.device)
        condition = self.time(time_waves(time).to(x.dtype))
        parts = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))
        text = self.text_down(F.gelu(self.text_up(text), approximate="tanh"))
        x = patches.flatten(2).transpose(1, 2)  # [batch, seq, dim]
        for block in self.blocks:
            x = block(x, text, parts, rotary)
        shift, scale = (self.table + condition[:, None]).chunk(2, dim=1)
        y = self.head(self.norm(x) * (1 + scale) + shift)
        y = y.unflatten(-1, (*self.config.patch, -1)).unflatten(1, grid)
        y = y.permute(0, 7, 1, 4, 2, 5, 3, 6)  # each axis of the grid beside that of the patch
        velocity: Tensor = y.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return velocity

    def example_inputs(
        self, batch: int = 2, frames: int = 2, height: int = 4, width: int = 6, words: int = 5
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a valid batch of latent videos with text."""
        x = ramp(batch, self.config.channels, frames, height, width)
        return x, ramp(batch, words, self.config.text_dim), torch.linspace(10, 500, batch)


class Block(nn.Module):
    """Attention to the video, attention to the text, and a feed-forward network."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config)
        self.cross_norm = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        text: Float[Tensor, "batch words dim"],
        parts: Float[Tensor, "batch 6 dim"],
        rotary: Rotary,
    ) -> Float[Tensor, "batch seq dim"]:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.table + parts).chunk(6, dim=1)
        y = self.attention_norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(y, y, rotary)
        x = x + self.cross_attention(self.cross_norm(x), text)
        y = self.up(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * self.down(F.gelu(y, approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention of one sequence to another or, turned by position, to itself."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.query_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        source: Float[Tensor, "batch keys dim"],
        rotary: Rotary | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, seq, head_dim]
            for y in (
                self.query_norm(self.query(x)),
                self.key_norm(self.key(source)),
                self.value(source),
            )
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair of neighbouring numbers by its angle."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotations(grid: torch.Size, head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Return cosines and sines of the angles of frame, row and column.

    Rows and columns turn a third of a head each, in whole pairs; frames turn the rest.
    """
    third = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * third, third, third)):
        frequencies = theta ** -(torch.arange(0, width, 2, device=device) / width)
        angle = torch.arange(grid[axis], device=device)[:, None] * frequencies
        shape = [1, 1, 1, width // 2]
        shape[axis] = grid[axis]
        angles.append(angle.reshape(shape).expand(*grid, -1))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)  # [seq, head_dim / 2]
    return joined.cos(), joined.sin()


def time_waves(time: Float[Tensor, " batch"], width: int = 256) -> Float[Tensor, "batch width"]:
    """Return cosines, then sines, of the time at frequencies from 1 towards 1/10000."""
    exponents = torch.arange(width // 2, device=time.device) / (width // 2)
    angles = time[:, None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def ramp(*shape: int) -> Float[Tensor, "..."]:
    """Return numbers from -1 to 1."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
