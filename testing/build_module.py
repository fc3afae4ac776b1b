"""A config as an `nn.Module`, written as people write models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configs import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from .module_heads import Attention, Heads
from .module_layers import FeedForward, modulate, norm, norms, projections
from .values import TEXT, weight


def to_module(config: ModelConfig) -> nn.Module:
    """Return the model, in eval mode, with the weights its config names."""
    dtype = getattr(torch, config.dtype)
    model = Model(config).to(dtype).eval().requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = weight(name, tensor.shape, config.weights, dtype)
    return model


class Model(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.embed = nn.Embedding(config.vocab, dim) if config.vocab else None
        block = JointBlock if config.family == "mmdit" else Block
        modulated = config.family in ("dit", "mmdit")
        blocks = [block(dim, part, modulated) for part in config.blocks]
        self.blocks = nn.ModuleList(blocks + blocks[-1:] if config.again else blocks)
        self.norm = norm(config.final_norm, dim)
        self.head = None
        if config.head != "none":
            self.head = nn.Linear(dim, config.vocab or dim, bias=False)
        if config.head == "tied":
            assert self.embed is not None
            assert self.head is not None
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        text: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks:
            if text is None:
                x = block(x, mask, bias, cond)
            else:
                x, text = block(x, text, cond)
        x = self.norm(x)
        return x * 1 if self.head is None else self.head(x)


class Block(nn.Module):
    """A residual block, modulated by a condition if it has one."""

    def __init__(self, dim: int, config: BlockConfig, modulated: bool) -> None:
        super().__init__()
        self.config = config
        self.attn = self.ffn = None
        if config.attention is not None:
            self.attn = Attention(dim, config.attention, config.spelled)
            self.norm1, self.after1 = norms(config, dim)
            self.mod1 = nn.Linear(dim, 3 * dim) if modulated else None
        if config.ffn is not None:
            self.ffn = FeedForward(dim, config.ffn, config)
            self.norm2, self.after2 = norms(config, dim)
            self.mod2 = nn.Linear(dim, 3 * dim) if modulated else None

    def forward(
        self, x: Tensor, mask: Tensor | None, bias: Tensor | None, cond: Tensor | None
    ) -> Tensor:
        if self.config.parallel and self.attn is not None and self.ffn is not None:
            h = self.norm1(x)
            return x + self.attn(h, mask, bias) + self.ffn(h)
        if self.attn is not None:
            h, gate = self.before(x, self.norm1, self.mod1, cond)
            x = self.add(x, self.attn(h, mask, bias), gate, self.norm1, self.after1)
        if self.ffn is not None:
            h, gate = self.before(x, self.norm2, self.mod2, cond)
            x = self.add(x, self.ffn(h), gate, self.norm2, self.after2)
        return x

    def before(
        self, x: Tensor, norm: nn.Module, mod: nn.Module | None, cond: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a branch reads, and its gate."""
        h = x if self.config.place == "post" else norm(x)
        return (h, None) if mod is None or cond is None else modulate(h, mod, cond)

    def add(
        self, x: Tensor, y: Tensor, gate: Tensor | None, norm: nn.Module, after: nn.Module
    ) -> Tensor:
        """Add a branch to the stream."""
        y = after(y) if self.config.place == "sandwich" else y
        x = x + (y if gate is None else gate * y)
        return norm(x) if self.config.place == "post" else x


class JointBlock(nn.Module):
    """Two streams with weights of their own that attend to each other."""

    def __init__(self, dim: int, config: BlockConfig, modulated: bool) -> None:
        super().__init__()
        self.heads = self.feed = None
        if config.attention is not None:
            attention = config.attention
            self.project = nn.ModuleList(Project(dim, config, attention) for _ in range(2))
            self.heads = Heads(attention, config.spelled)
            self.o = nn.ModuleList(projections(dim, attention)[3] for _ in range(2))
        if config.ffn is not None:
            self.feed = nn.ModuleList(Feed(dim, config, config.ffn) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        if self.heads is not None:
            *image, gate = self.project[0](x, cond)
            *words, gate2 = self.project[1](text, cond)
            q, k, v = (torch.cat((b, a), dim=1) for a, b in zip(image, words, strict=True))
            y = self.heads(q, k, v, None, None)
            x = x + gate * self.o[0](y[:, TEXT:])
            text = text + gate2 * self.o[1](y[:, :TEXT])
        if self.feed is not None:
            x, text = self.feed[0](x, cond), self.feed[1](text, cond)
        return x, text


class Project(nn.Module):
    """One stream's norm and projections."""

    def __init__(self, dim: int, config: BlockConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.norm = norm(config.norm, dim, config.spelled)
        self.mod = nn.Linear(dim, 3 * dim)
        self.q, self.k, self.v, _ = projections(dim, attention)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, gate = modulate(self.norm(x), self.mod, cond)
        return self.q(h), self.k(h), self.v(h), gate


class Feed(nn.Module):
    """One stream's feed-forward network with its norm, added to the stream."""

    def __init__(self, dim: int, config: BlockConfig, ffn: FeedForwardConfig) -> None:
        super().__init__()
        self.norm = norm(config.norm, dim, config.spelled)
        self.mod = nn.Linear(dim, 3 * dim)
        self.ffn = FeedForward(dim, ffn, config)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h, gate = modulate(self.norm(x), self.mod, cond)
        return x + gate * self.ffn(h)
