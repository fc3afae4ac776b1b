"""GPT: a pre-norm causal decoder, as in GPT-2.

x = x + attention(norm(x))        x = x + down(gelu(up(norm(x))))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Attributes:
        vocab: Tokens.
        context: Longest sequence.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.

    Source: Radford et al., 2019 (GPT-2).
    Differs: query, key and value are three layers, where GPT-2 has one of three times the width.
    """

    vocab: int = 50257
    context: int = 1024
    dim: int = 768
    heads: int = 12
    depth: int = 12
    ffn_dim: int = 3072


GPT2_SMALL = GPTConfig()
GPT2_MEDIUM = GPTConfig(dim=1024, heads=16, depth=24, ffn_dim=4096)
GPT2_LARGE = GPTConfig(dim=1280, heads=20, depth=36, ffn_dim=5120)
GPT2_XL = GPTConfig(dim=1600, heads=25, depth=48, ffn_dim=6400)
TOY = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)


class GPT(nn.Module):
    """Token and position embeddings, blocks, final norm, and a head tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)  # [batch, seq, dim]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def example_inputs(self, batch: int = 2, seq: int = 16) -> tuple[Tensor]:
        """Return a valid batch of sequences."""
        length = min(seq, self.config.context)
        return (torch.arange(batch * length).reshape(batch, length) % self.config.vocab,)


class Block(nn.Module):
    """Attention and feed-forward network, each behind its norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        x = x + self.attention(self.attention_norm(x))
        hidden = F.gelu(self.up(self.ffn_norm(x)), approximate="tanh")
        return x + self.down(hidden)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (
            layer(x)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)  # [batch, heads, seq, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged
