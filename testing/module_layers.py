"""Layers of the models in `build_module`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configs import AttentionConfig, BlockConfig, FeedForwardConfig


class FeedForward(nn.Module):
    """Two linear layers, or three with a gate."""

    def __init__(self, dim: int, config: FeedForwardConfig, block: BlockConfig) -> None:
        super().__init__()
        linear = AddmmLinear if block.transposed else nn.Linear
        self.act, self.written_out = config.activation, block.spelled
        bias = config.bias or block.transposed
        self.gate = linear(dim, config.hidden, bias=bias) if config.gated else None
        self.up = linear(dim, config.hidden, bias=bias)
        self.down = linear(config.hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(activate(self.up(x), self.act, self.written_out))
        return self.down(activate(self.gate(x), self.act, self.written_out) * self.up(x))


class AddmmLinear(nn.Module):
    """A linear layer as GPT-2 has it: weight [in, out], leading axes flattened."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


def activate(x: Tensor, kind: str, written_out: bool) -> Tensor:
    """Apply an activation, as one op or written out."""
    if kind in ("identity", "square", "relu"):
        return {"identity": lambda: x, "square": lambda: x * x, "relu": lambda: F.relu(x)}[kind]()
    if kind == "silu":
        return x * torch.sigmoid(x) if written_out else F.silu(x)
    if not written_out:
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


class SpelledRMSNorm(nn.Module):
    """RMS norm in elementary ops."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def norm(kind: str, size: int, spelled: bool = False) -> nn.Module:
    """Return a norm; `none` passes its input on."""
    if kind == "none":
        return nn.Identity()
    if kind == "layer":
        return nn.LayerNorm(size)
    return SpelledRMSNorm(size) if spelled else nn.RMSNorm(size, eps=1e-5)


def norms(config: BlockConfig, dim: int) -> tuple[nn.Module, nn.Module]:
    """Return the norms before (or, for `post`, after the sum) and after a branch."""
    sandwich = config.norm if config.place == "sandwich" else "none"
    return norm(config.norm, dim, config.spelled), norm(sandwich, dim, config.spelled)


def projections(dim: int, config: AttentionConfig) -> tuple[nn.Module, ...]:
    """Return the linear layers of query, key, value and output."""
    inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = ((dim, inner), (dim, kv), (dim, kv), (inner, dim))
    return tuple(nn.Linear(*size, bias=config.bias) for size in sizes)


def modulate(x: Tensor, mod: nn.Module, cond: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift by a condition; return the gate of the branch too."""
    shift, scale, gate = mod(F.relu(cond))[:, None].chunk(3, dim=-1)
    return x * (1 + scale) + shift, gate
