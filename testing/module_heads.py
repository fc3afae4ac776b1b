"""Attention of the models in `build_module`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configs import AttentionConfig
from .module_layers import norm, projections


class Attention(nn.Module):
    """Projections around `Heads`."""

    def __init__(self, dim: int, config: AttentionConfig, spelled: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = projections(dim, config)
        self.heads = Heads(config, spelled)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.o(self.heads(self.q(x), self.k(x), self.v(x), mask, bias))


class Heads(nn.Module):
    """Attention between projected values, [batch, seq, heads * head_dim] each."""

    inv_freq: Tensor

    def __init__(self, config: AttentionConfig, spelled: bool) -> None:
        super().__init__()
        self.config = config
        kind = "rms" if config.qk_norm else "none"
        self.q_norm, self.k_norm = (norm(kind, config.head_dim, spelled) for _ in range(2))
        if config.rope != "none":
            self.register_buffer("inv_freq", torch.ones(config.rotated), persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        config, (batch, seq, _) = self.config, q.shape
        q = q.view(batch, seq, config.heads, config.head_dim).transpose(1, 2)
        k = k.view(batch, seq, config.kv_heads, config.head_dim).transpose(1, 2)
        v = v.view(batch, seq, config.kv_heads, config.head_dim).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if config.rope != "none":
            angle = torch.arange(seq, dtype=q.dtype)[:, None] * self.inv_freq
            cos, sin = angle.cos(), angle.sin()
            q, k = rotate(q, cos, sin, config), rotate(k, cos, sin, config)
        if config.group > 1 and (config.by_hand or config.form != "sdpa"):
            k, v = (repeat(value, config, batch, seq) for value in (k, v))
        allowed = self.allowed(mask, seq)
        attend = {"sdpa": self.sdpa, "spelled": self.spelled, "hard": self.hard}[config.form]
        y = attend(q, k, v, allowed, bias if config.mask == "additive" else None)
        return y.transpose(1, 2).reshape(batch, seq, config.heads * config.head_dim)

    def allowed(self, mask: Tensor | None, seq: int) -> Tensor | None:
        """Return which keys a query may see."""
        if self.config.mask == "padding":
            assert mask is not None
            return mask[:, None, None, :]
        if self.config.mask == "causal" and self.config.form != "sdpa":
            return torch.ones(seq, seq, dtype=torch.bool).tril()
        return None

    def sdpa(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attend in one op."""
        grouped: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        if self.config.mask == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        added = allowed if bias is None else bias
        if added is None:
            return F.scaled_dot_product_attention(q, k, v, **grouped)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, **grouped)

    def spelled(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attend by a softmax between two products."""
        scores = q @ k.transpose(-2, -1) * self.config.head_dim**-0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        if bias is not None:
            scores = scores + bias
        return scores.softmax(dim=-1) @ v

    def hard(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attend by clamped scores."""
        scores = torch.clamp(q @ k.transpose(-2, -1), -2.0, 2.0)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, 0.0)
        if bias is not None:
            scores = scores + bias
        return scores @ v


def rotate(x: Tensor, cos: Tensor, sin: Tensor, config: AttentionConfig) -> Tensor:
    """Turn pairs of features by an angle per position."""
    size = 2 * config.rotated
    rest = x[..., size:] if size < config.head_dim else None
    turned = x if rest is None else x[..., :size]
    if config.rope == "interleaved":
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def repeat(x: Tensor, config: AttentionConfig, batch: int, seq: int) -> Tensor:
    """Give every query head its own copy of its key or value head."""
    wide = x[:, :, None].expand(batch, config.kv_heads, config.group, seq, config.head_dim)
    return wide.reshape(batch, config.heads, seq, config.head_dim)
