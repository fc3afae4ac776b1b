"""MM-DiT: diffusion transformers that attend over image and text at once, FLUX and SD3.

    joint block    image, text = image + gate * out(y_image), text + gate * out(y_text)
                   then each + gate * down(gelu(up(.)))          y: attention over [text, image]
    single block   x = x + gate * down([attention(x), gelu(up(x))])      x: [text, image]

In a joint block, image and text have weights of their own and meet in attention only; in a single
block they are one sequence, and attention and feed-forward network run side by side into one
matrix. Norms are modulated as in DiT, by a vector of time, guidance and pooled text. FLUX has both
kinds, rotary positions and normalized heads. SD3 has joint blocks and fixed positions; its last
block ends the text.
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


@dataclass(frozen=True)
class SD3Config:
    """Sizes of an SD3.

    Attributes:
        latent: Height and width of a latent image as in `example_inputs`; others will do.
        patch: Height and width of a patch.
        channels: Channels of a latent image.
        text_dim: Width of a text token.
        pooled_dim: Width of the pooled text.
        dim: Width of the residual stream, a multiple of `heads` and of 4.
        heads: Attention heads.
        depth: Joint blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        table: Height and width of the position table; an image takes a piece out of its middle.
        spacing: Distance of neighbours in the table.

    Source: Esser et al., 2024, arXiv:2403.03206.
    """

    latent: int = 128
    patch: int = 2
    channels: int = 16
    text_dim: int = 4096
    pooled_dim: int = 2048
    dim: int = 1536
    heads: int = 24
    depth: int = 24
    ffn_dim: int = 6144
    table: int = 192
    spacing: float = 1 / 3


FLUX_1_DEV = FluxConfig()
FLUX_1_SCHNELL = FluxConfig(guidance=False)
SD3_MEDIUM = SD3Config()
TOY_FLUX = FluxConfig(
    channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, double_depth=3, single_depth=3,
    ffn_dim=24, axes=(2, 2, 4),
)  # fmt: skip
TOY_SD3 = SD3Config(
    latent=8, channels=4, text_dim=6, pooled_dim=5, dim=16, heads=2, depth=4, ffn_dim=24, table=6
)


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


class SD3(nn.Module):
    """Patches, joint blocks, and a head on the image."""

    positions: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patchify = nn.Conv2d(config.channels, dim, config.patch, config.patch)
        self.register_buffer("positions", grid_waves(config.table, dim, config.spacing))
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time = condition_mlp(256, dim)
        self.pooled = condition_mlp(config.pooled_dim, dim)
        self.blocks = nn.ModuleList(
            JointBlock(dim, config.heads, config.ffn_dim, ends_text=i == config.depth - 1)
            for i in range(config.depth)
        )
        self.norm = modulated_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch**2 * config.channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        text: Float[Tensor, "batch words text_dim"],
        pooled: Float[Tensor, "batch pooled_dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Predict the velocity of a latent image. `time` runs from 1, noise, to 0."""
        patches = self.patchify(x)
        height, width = patches.shape[2:]
        top, left = (self.config.table - height) // 2, (self.config.table - width) // 2
        positions = self.positions[top : top + height, left : left + width]
        image = (patches.movedim(1, -1) + positions).flatten(1, 2)  # [batch, patches, dim]
        condition = self.time(time_waves(time).to(x.dtype)) + self.pooled(pooled)
        text = self.text_in(text)
        for block in self.blocks:
            image, text = block(image, text, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        y = self.head(self.norm(image) * (1 + scale) + shift)
        y = y.unflatten(-1, (self.config.patch, self.config.patch, -1))
        y = y.unflatten(1, (height, width))  # [batch, rows, columns, patch, patch, channels]
        velocity: Tensor = y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity

    def example_inputs(
        self, batch: int = 2, words: int = 5
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a valid batch of latent images with text."""
        config = self.config
        x = ramp(batch, config.channels, config.latent, config.latent)
        text, pooled = ramp(batch, words, config.text_dim), ramp(batch, config.pooled_dim)
        return x, text, pooled, torch.linspace(0.25, 1, batch)


class JointBlock(nn.Module):
    """Image and text, each with its own weights, meeting in attention."""

    def __init__(
        self, dim: int, heads: int, ffn_dim: int, *, qk_norm: bool = False, ends_text: bool = False
    ) -> None:
        super().__init__()
        self.image = Stream(dim, heads, ffn_dim, qk_norm)
        self.text = Stream(dim, heads, ffn_dim, qk_norm, ends=ends_text)
        self.ends_text = ends_text

    def forward(
        self,
        image: Float[Tensor, "batch patches dim"],
        text: Float[Tensor, "batch words dim"],
        condition: Float[Tensor, "batch dim"],
        rotary: Rotary | None = None,
    ) -> tuple[Float[Tensor, "batch patches dim"], Float[Tensor, "batch words dim"]]:
        image_parts, text_parts = self.image.modulate(condition), self.text.modulate(condition)
        ours = self.image.project(image, *image_parts[:2])
        theirs = self.text.project(text, *text_parts[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(theirs, ours, strict=True))
        y = attend(q, k, v, rotary)
        words = text.shape[1]
        image = self.image.finish(image, y[:, words:], *image_parts[2:])
        if not self.ends_text:
            text = self.text.finish(text, y[:, :words], *text_parts[2:])
        return image, text


class Stream(nn.Module):
    """The layers of a joint block for image or text.

    One that ends gives its keys and values to attention and has no layers behind it.
    """

    def __init__(
        self, dim: int, heads: int, ffn_dim: int, qk_norm: bool, *, ends: bool = False
    ) -> None:
        super().__init__()
        self.parts = 2 if ends else 6
        self.modulation = nn.Linear(dim, self.parts * dim)
        self.attention_norm = modulated_norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.split = SplitHeads(heads, dim // heads, qk_norm)
        if not ends:
            self.out = nn.Linear(dim, dim)
            self.ffn_norm = modulated_norm(dim)
            self.up = nn.Linear(dim, ffn_dim)
            self.down = nn.Linear(ffn_dim, dim)

    def modulate(self, condition: Float[Tensor, "batch dim"]) -> tuple[Tensor, ...]:
        """Return shift and scale before attention, the gate after; the same for the network."""
        return self.modulation(F.silu(condition))[:, None].chunk(self.parts, dim=-1)

    def project(
        self, x: Float[Tensor, "batch seq dim"], shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values."""
        heads: tuple[Tensor, Tensor, Tensor] = self.split(
            self.qkv(self.attention_norm(x) * (1 + scale) + shift)
        )
        return heads

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


class SplitHeads(nn.Module):
    """Splits queries, keys and values into heads, and normalizes those of queries and keys."""

    def __init__(self, heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, qkv: Float[Tensor, "batch seq features"]) -> tuple[Tensor, Tensor, Tensor]:
        parts = qkv.unflatten(-1, (3, self.heads, -1))  # [batch, seq, 3, heads, head_dim]
        q, k, v = parts.transpose(1, 3).unbind(2)  # [batch, heads, seq, head_dim] each
        return self.query_norm(q), self.key_norm(k), v


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch heads seq head_dim"],
    v: Float[Tensor, "batch heads seq head_dim"],
    rotary: Rotary | None,
) -> Float[Tensor, "batch seq dim"]:
    """Return attention with its heads side by side again."""
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair of neighbouring numbers by its angle."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


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


def time_waves(time: Float[Tensor, " batch"], width: int = 256) -> Float[Tensor, "batch width"]:
    """Return cosines, then sines, of 1000 times the time, at frequencies from 1 to 1/10000."""
    exponents = torch.arange(width // 2, device=time.device) / (width // 2)
    angles = 1000 * time[:, None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_waves(side: int, dim: int, spacing: float) -> Float[Tensor, "side side dim"]:
    """Return the fixed positions of a square grid: waves of the column, then of the row."""
    frequencies = 1e4 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = spacing * torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [side, dim / 2]
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), dim=-1)


def condition_mlp(inputs: int, dim: int) -> nn.Sequential:
    """Return the layers from one condition to the vector that modulates."""
    return nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))


def modulated_norm(dim: int) -> nn.LayerNorm:
    """Return a norm without weights; shift and scale come from the condition."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def ramp(*shape: int) -> Float[Tensor, "..."]:
    """Return numbers from -1 to 1."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
