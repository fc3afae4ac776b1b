"""BERT: a post-norm bidirectional encoder.

x = norm(x + attention(x))        x = norm(x + down(gelu(up(x))))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT.

    Attributes:
        vocab: Tokens.
        context: Longest sequence.
        types: Kinds of segment, such as question and answer.
        dim: Width of the residual stream, a multiple of `heads`.
        heads: Attention heads.
        depth: Blocks.
        ffn_dim: Hidden neurons of a feed-forward network.
        norm_eps: Added to the variance in a norm.

    Source: Devlin et al., 2019, arXiv:1810.04805.
    Differs: no dropout and no pre-training heads.
    """

    vocab: int = 30522
    context: int = 512
    types: int = 2
    dim: int = 768
    heads: int = 12
    depth: int = 12
    ffn_dim: int = 3072
    norm_eps: float = 1e-12


BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(dim=1024, heads=16, depth=24, ffn_dim=4096)
MINILM_L6 = BertConfig(dim=384, depth=6, ffn_dim=1536)
TOY = BertConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)


class Bert(nn.Module):
    """Embeddings, blocks, and a pooler on the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.types = nn.Embedding(config.types, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.pooler = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        types: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch dim"]]:
        """Return every token's features, and those of the whole sequence.

        `mask` is True at tokens to look at and False at padding.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.tokens(tokens) + self.positions(places) + self.types(types))
        for block in self.blocks:
            x = block(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))

    def example_inputs(self, batch: int = 2, seq: int = 16) -> tuple[Tensor, Tensor, Tensor]:
        """Return a valid batch of sequences of two segments; every other one ends in padding."""
        length = min(seq, self.config.context)
        tokens = torch.arange(batch * length).reshape(batch, length) % self.config.vocab
        places = torch.arange(length).expand(batch, length)
        lengths = length - torch.arange(batch)[:, None] % 2 * (length // 4)
        return tokens, (places >= length // 2).long() % self.config.types, places < lengths


class Block(nn.Module):
    """Attention and feed-forward network, each beside a residual and before its norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        x = self.attention_norm(x + self.attention(x, mask))
        y: Tensor = self.ffn_norm(x + self.down(F.gelu(self.up(x))))
        return y


class Attention(nn.Module):
    """Multi-head attention that does not look at padding."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (
            layer(x)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)  # [batch, heads, seq, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged
