"""MM-DiT: diffusion transformers that attend over image and text at once; what FLUX and SD3 share.

    joint block    image, text = image + gate * out(y_image), text + gate * out(y_text)
                   then each + gate * down(gelu(up(.)))          y: attention over [text, image]

In a joint block, image and text have weights of their own and meet in attention only. Norms are
modulated as in DiT, by a vector of time, pooled text and what else there is.

Source: Esser et al., 2024, arXiv:2403.03206, section 4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [seq, half] each


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


def time_waves(time: Float[Tensor, " batch"], width: int = 256) -> Float[Tensor, "batch width"]:
    """Return cosines, then sines, of 1000 times the time, at frequencies from 1 to 1/10000."""
    exponents = torch.arange(width // 2, device=time.device) / (width // 2)
    angles = 1000 * time[:, None].float() * torch.exp(-math.log(1e4) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def condition_mlp(inputs: int, dim: int) -> nn.Sequential:
    """Return the layers from one condition to the vector that modulates."""
    return nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))


def modulated_norm(dim: int) -> nn.LayerNorm:
    """Return a norm without weights; shift and scale come from the condition."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def ramp(*shape: int) -> Float[Tensor, "..."]:
    """Return numbers from -1 to 1."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
