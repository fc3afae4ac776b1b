"""Llama: a pre-norm causal decoder with rotary positions, as in Llama 2, Llama 3 and Qwen3.

x = x + attention(norm(x))        x = x + down(silu(gate(norm(x))) * up(norm(x)))

A norm divides by the root mean square, and nothing has a bias. Numbers i and i + head_dim / 2 of a
query or key are turned together by an angle that grows with the position. Several query heads
share one head of keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [seq, half] each


@dataclass(frozen=True)
class Stretch:
    """How rotary positions trained on a short context are stretched to a long one.

    Attributes:
        factor: What slow rotations are slowed down by.
        slow: Turns over the short context up to which a rotation is slow.
        fast: Turns from which it stays as it is. Between the two, the change is gradual.
        context: Length of the short context.

    Source: Grattafiori et al., 2024 (Llama 3), arXiv:2407.21783, and the code released with it.
    """

    factor: float = 8.0
    slow: float = 1.0
    fast: float = 4.0
    context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama.

    Attributes:
        vocab: Tokens.
        context: Longest sequence it was trained for.
        dim: Width of the residual stream.
        heads: Query heads, a multiple of `kv_heads`.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head, even; `heads * head_dim` need not be `dim`.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        norm_eps: Added to the mean square in a norm.
        theta: Base of the rotation frequencies.
        stretch: Adjusts the rotations to a longer context.
        qk_norm: Normalize each head of queries and keys, as Qwen3 does.
        tied: The head is the embedding.

    Source: Touvron et al., 2023 (Llama 2), arXiv:2307.09288; Yang et al., 2025 (Qwen3),
        arXiv:2505.09388.
    """

    vocab: int = 32000
    context: int = 4096
    dim: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    depth: int = 32
    ffn_dim: int = 11008
    norm_eps: float = 1e-5
    theta: float = 1e4
    stretch: Stretch | None = None
    qk_norm: bool = False
    tied: bool = False


LLAMA_2_7B = LlamaConfig()
LLAMA_3_1_8B = LlamaConfig(
    vocab=128256, context=131072, kv_heads=8, ffn_dim=14336, theta=5e5, stretch=Stretch()
)
QWEN3_0_6B = LlamaConfig(
    vocab=151936, context=40960, dim=1024, heads=16, kv_heads=8, depth=28, ffn_dim=3072,
    norm_eps=1e-6, theta=1e6, qk_norm=True, tied=True,
)  # fmt: skip
QWEN3_8B = LlamaConfig(
    vocab=151936, context=40960, kv_heads=8, depth=36, ffn_dim=12288,
    norm_eps=1e-6, theta=1e6, qk_norm=True,
)  # fmt: skip
TOY = LlamaConfig(
    vocab=32, context=32, dim=8, heads=4, kv_heads=2, head_dim=4, depth=3, ffn_dim=12, theta=100.0
)


class Llama(nn.Module):
    """Token embedding, blocks, final norm and head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight

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

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], rotary: Rotary
    ) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x), rotary)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Attention(nn.Module):
    """Causal attention in which groups of query heads share keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.dim, width, bias=False)
        self.key = nn.Linear(config.dim, kv_width, bias=False)
        self.value = nn.Linear(config.dim, kv_width, bias=False)
        self.out = nn.Linear(width, config.dim, bias=False)
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.grouped = config.heads != config.kv_heads

    def forward(
        self, x: Float[Tensor, "batch seq dim"], rotary: Rotary
    ) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (
            layer(x)
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)  # [batch, heads or kv_heads, seq, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        q, k = rotate(self.query_norm(q), rotary), rotate(self.key_norm(k), rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair of numbers, one from either half of a head, by its angle."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def frequencies(config: LlamaConfig, device: torch.device) -> Float[Tensor, " half"]:
    """Return the angle by which each pair turns per position, in radians.

    Computed at every call: as a buffer it would be rounded with the weights of a bfloat16 model.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    turning = config.theta**-exponents
    if config.stretch is None:
        return turning
    factor, slow, fast = config.stretch.factor, config.stretch.slow, config.stretch.fast
    turns = turning * config.stretch.context / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return turning * (kept + (1 - kept) / factor)
