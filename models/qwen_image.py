"""Qwen-Image: a diffusion transformer that attends over image and text at once.

    image, text = image + gate * out(y_image), text + gate * out(y_text)
    then each   + gate * down(gelu(up(.)))                y: attention over [text, image]

Image and text have weights of their own and meet in attention only, from the first block to the
last. Norms are modulated by the time alone. Queries and keys of each side are normalized per head
and turned before the two are joined: image patches by row and column counted from the middle of
the image, words by their number, counted on from the edge of the image along all axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [seq, half] each


@dataclass(frozen=True)
class QwenImageConfig:
    """Sizes of a Qwen-Image.

    Attributes:
        patch: Height and width of a patch.
        channels: Channels of a latent image.
        text_dim: Width of a text token.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        axes: Rotated numbers of a head for image, row and column; they add up to a head.
        theta: Base of the rotation frequencies.

    Source: Wu et al., 2025, arXiv:2508.02324.
    Differs: rotations are written with real numbers, where the released code has complex ones.
    """

    patch: int = 2
    channels: int = 16
    text_dim: int = 3584
    dim: int = 3072
    heads: int = 24
    depth: int = 60
    ffn_dim: int = 12288
    axes: tuple[int, int, int] = (16, 56, 56)
    theta: float = 1e4


QWEN_IMAGE = QwenImageConfig()
TOY = QwenImageConfig(
    channels=4, text_dim=6, dim=16, heads=2, depth=3, ffn_dim=24, axes=(2, 2, 4), theta=100.0
)


class QwenImage(nn.Module):
    """Patches, joint blocks, and a head on the image."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.config = config
        dim, features = config.dim, config.patch**2 * config.channels
        self.image_in = nn.Linear(features, dim)
        self.text_norm = nn.RMSNorm(config.text_dim, eps=1e-6)
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = modulated_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, features)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        text: Float[Tensor, "batch words text_dim"],
        mask: Bool[Tensor, "batch words"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Predict the velocity of a latent image.

        `mask` is True at words to look at. `time` runs from 1, noise, to 0.
        """
        patch = self.config.patch
        x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        x = x.permute(0, 2, 4, 1, 3, 5)  # [batch, rows, columns, channels, patch, patch]
        rows, columns = x.shape[1:3]
        image, text = self.image_in(x.flatten(3).flatten(1, 2)), self.text_in(self.text_norm(text))
        turns = [
            rotations(places, self.config.axes, self.config.theta)
            for places in places_of(rows, columns, text.shape[1], x.device)
        ]
        condition = F.silu(self.time(time_waves(time).to(x.dtype)))
        keys = torch.cat((mask, mask.new_ones(image.shape[:2])), dim=1)[:, None, None]
        for block in self.blocks:
            image, text = block(image, text, condition, *turns, keys)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        y = self.head(self.norm(image) * (1 + scale) + shift)
        y = y.unflatten(-1, (-1, patch, patch)).unflatten(1, (rows, columns))
        velocity: Tensor = y.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return velocity

    def example_inputs(
        self, batch: int = 2, height: int = 6, width: int = 8, words: int = 5
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a valid batch of latent images with text; every other text ends in padding."""
        x, text = (
            ramp(batch, self.config.channels, height, width),
            ramp(batch, words, self.config.text_dim),
        )
        lengths = words - torch.arange(batch)[:, None] % 2 * (words // 4)
        return x, text, torch.arange(words) < lengths, torch.linspace(0.25, 1, batch)


class Block(nn.Module):
    """Image and text, each with its own weights, meeting in attention."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(
        self,
        image: Float[Tensor, "batch patches dim"],
        text: Float[Tensor, "batch words dim"],
        condition: Float[Tensor, "batch dim"],
        image_turns: Rotary,
        text_turns: Rotary,
        keys: Bool[Tensor, "batch 1 1 seq"],
    ) -> tuple[Float[Tensor, "batch patches dim"], Float[Tensor, "batch words dim"]]:
        image_parts, text_parts = self.image.modulate(condition), self.text.modulate(condition)
        ours = self.image.project(image, image_turns, *image_parts[:2])
        theirs = self.text.project(text, text_turns, *text_parts[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(theirs, ours, strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
        words = text.shape[1]
        image = self.image.finish(image, y[:, words:], *image_parts[2:])
        return image, self.text.finish(text, y[:, :words], *text_parts[2:])


class Stream(nn.Module):
    """The layers of a block for image or text."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.dim // config.heads
        self.heads = config.heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention_norm = modulated_norm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = modulated_norm(dim)
        self.up = nn.Linear(dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, dim)

    def modulate(self, condition: Float[Tensor, "batch dim"]) -> tuple[Tensor, ...]:
        """Return shift and scale before attention, the gate after; the same for the network."""
        return self.modulation(condition)[:, None].chunk(6, dim=-1)

    def project(
        self, x: Float[Tensor, "batch seq dim"], turns: Rotary, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [batch, heads, seq, head_dim] each."""
        y = self.attention_norm(x) * (1 + scale) + shift
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return rotate(self.query_norm(q), turns), rotate(self.key_norm(k), turns), v

    def finish(
        self,
        x: Float[Tensor, "batch seq dim"],
        attended: Float[Tensor, "batch seq dim"],
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        ffn_gate: Tensor,
    ) -> Float[Tensor, "batch seq dim"]:
        """Add what attention found, then the feed-forward network."""
        x = x + gate * self.out(attended)
        hidden = self.up(self.ffn_norm(x) * (1 + scale) + shift)
        return x + ffn_gate * self.down(F.gelu(hidden, approximate="tanh"))


def places_of(
    rows: int, columns: int, words: int, device: torch.device
) -> tuple[Float[Tensor, "patches 3"], Float[Tensor, "words 3"]]:
    """Return image, row and column of every patch, and those of every word."""
    down = torch.arange(rows, device=device) - (rows - rows // 2)
    across = torch.arange(columns, device=device) - (columns - columns // 2)
    zeros = torch.zeros(1, device=device)
    patches = torch.cartesian_prod(zeros, down.float(), across.float())
    counted = torch.arange(words, device=device) + max(rows // 2, columns // 2)
    return patches, counted.float()[:, None].expand(-1, 3)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair of neighbouring numbers by its angle."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotations(places: Float[Tensor, "seq axes"], axes: tuple[int, ...], theta: float) -> Rotary:
    """Return cosines and sines of the angles; each axis turns its own share of a head."""
    angles = torch.cat(
        [
            place[:, None] * theta ** -(torch.arange(0, width, 2, device=place.device) / width)
            for place, width in zip(places.unbind(-1), axes, strict=True)
        ],
        dim=-1,
    )
    return angles.cos(), angles.sin()


def time_waves(time: Float[Tensor, " batch"], width: int = 256) -> Float[Tensor, "batch width"]:
    """Return cosines, then sines, of 1000 times the time, at frequencies from 1 to 1/10000."""
    exponents = torch.arange(width // 2, device=time.device) / (width // 2)
    angles = 1000 * time[:, None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def modulated_norm(dim: int) -> nn.LayerNorm:
    """Return a norm without weights; shift and scale come from the condition."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def ramp(*shape: int) -> Float[Tensor, "..."]:
    """Return numbers from -1 to 1."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
