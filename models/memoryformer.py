"""MemoryFormer: a decoder whose projections are rows of tables, read by the signs of their input.

    layer(z) = sum over chunks k of  score(z_k) * table[k, signs(z_k)] + bias

    q, k, v = layer(norm(x)), hashed once           x = x + attention(q, k, v), nothing behind it
    x = x + second(norm'(first(norm(x))))           no activation function between the two

A chunk of `bits` elements addresses one of 2 ** bits rows, so a layer reads dim / bits rows instead
of multiplying by a matrix. Gradients reach the input through the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .llama import Rotary, rotate


@dataclass(frozen=True, kw_only=True)
class MemoryFormerConfig:
    """Sizes of a MemoryFormer.

    Attributes:
        vocab: Tokens.
        context: Longest sequence it was trained for.
        dim: Width of the residual stream, a multiple of `heads` and of `bits`.
        heads: Attention heads.
        depth: Blocks.
        bits: Elements of a chunk.
        widen: How a feed-forward network is wider inside: the second layer's tables have
            `extra_bits` more `bits` each, or there are twice as many `tables`.
        extra_bits: See `widen`.
        score: How much a row counts: `l1_softmax`, or `softmax` without the size of the chunk.
        rotary: Share of a head that is rotated by its position.

    Source: Ding et al., MemoryFormer, 2024, arXiv:2411.12992; code:
        github.com/C0-Design/MemoryFormer.
    """

    vocab: int = 50304
    context: int = 2048
    dim: int = 512
    heads: int = 8
    depth: int = 6
    bits: int = 8
    widen: Literal["bits", "tables"] = "bits"
    extra_bits: int = 2
    score: Literal["l1_softmax", "softmax"] = "l1_softmax"
    rotary: float = 0.25

    @property
    def hidden(self) -> tuple[int, int]:
        """Width inside a feed-forward network, and the bits of a chunk there."""
        if self.widen == "tables":
            return 2 * self.dim, self.bits
        bits = self.bits + self.extra_bits
        return self.dim // self.bits * bits, bits


MEMORYFORMER_TINY = MemoryFormerConfig()
# Depth and heads of Pythia-160M; the released file repeats those of the tiny model.
MEMORYFORMER_SMALL = MemoryFormerConfig(dim=768, heads=12, depth=12)
MEMORYFORMER_BASE = MemoryFormerConfig(dim=1024, heads=16, depth=24)
TOY = MemoryFormerConfig(vocab=32, context=16, dim=16, heads=2, depth=3, bits=4)


class MemoryFormer(nn.Module):
    """Token embedding, blocks, final norm and head."""

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        nn.init.normal_(self.tokens.weight, std=small_std(config.dim))

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        x = self.tokens(tokens)  # [batch, seq, dim]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        angles = places[:, None] * frequencies(self.config, tokens.device)  # [seq, half]
        rotary = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, rotary)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def example_inputs(self, batch: int = 2, seq: int = 16) -> tuple[Tensor]:
        """Return a valid batch of sequences."""
        length = min(seq, self.config.context)
        return (torch.arange(batch * length).reshape(batch, length) % self.config.vocab,)


class Block(nn.Module):
    """Attention and feed-forward network, each behind its norm and beside a residual."""

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__()
        hidden, bits = config.hidden
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim)
        self.first = MemoryLayer(config.dim, hidden, config.bits, config.score)
        self.middle_norm = nn.LayerNorm(hidden)
        self.second = MemoryLayer(hidden, config.dim, bits, config.score)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], rotary: Rotary
    ) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x), rotary)
        y: Tensor = self.middle_norm(self.first(self.ffn_norm(x)))
        return x + self.second(y)


class Attention(nn.Module):
    """Causal attention whose heads are left side by side."""

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__()
        self.heads, std = config.heads, small_std(config.dim)
        self.qkv = MemoryLayer(config.dim, 3 * config.dim, config.bits, config.score, std)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], rotary: Rotary
    ) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, seq, head_dim]
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        q, k = (rotate_part(heads, rotary) for heads in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class MemoryLayer(nn.Module):
    """Rows of tables in the place of a linear layer.

    PyTorch has no op for it; `blockwright::hash_linear` is there as soon as the package is.

    Args:
        dim: Width of what is hashed, a multiple of `bits`.
        out: Width of a row.
        bits: Bits that address a table.
        score: As in the configuration.
        std: Standard deviation of what tables begin with.
    """

    def __init__(self, dim: int, out: int, bits: int, score: str, std: float = 0.02) -> None:
        super().__init__()
        self.tables = nn.Parameter(std * torch.randn(dim // bits, 2**bits, out))
        self.bias = nn.Parameter(0.001 * torch.randn(out))
        self.score = score

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        y: Tensor = torch.ops.blockwright.hash_linear(x, self.tables, self.bias, self.score)
        return y


def rotate_part(
    x: Float[Tensor, "batch heads seq head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Rotate the first numbers of each head, as many as there are angles for."""
    width = 2 * rotary[0].shape[-1]
    turned, rest = x.split([width, x.shape[-1] - width], dim=-1)
    return torch.cat((rotate(turned, rotary), rest), dim=-1)


def frequencies(config: MemoryFormerConfig, device: torch.device) -> Float[Tensor, " half"]:
    """Return the angle by which each pair turns per position, in radians."""
    width = int(config.rotary * (config.dim // config.heads))
    return 10000.0 ** -(torch.arange(0, width, 2, device=device) / width)


def small_std(dim: int) -> float:
    """Return the deviation of what embedding and tables before an attention begin with.

    Source: Nguyen and Salazar, 2019, arXiv:1910.05895.
    """
    return math.sqrt(2 / (5 * dim))
