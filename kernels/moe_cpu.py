"""Feed-forward experts on a CPU: one small network per expert that is used, on all its tokens.

    sort        visits (token, choice) by expert                    [visits], visits = tokens * k
    gather      rows of x in that order                             [visits, dim]
    multiply    act(rows @ up.T) @ down.T, one product per expert   [visits, dim]
    combine     the k answers of a token, times weight              [tokens, dim]

Weights of experts nobody visits are not read, and k may be dynamic. A few visits are not sorted.
Inference only.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .activations import FUNCTIONS
from .experts import Experts

TENSORS: Final = ("gate", "up", "up_bias", "gate_bias", "down", "down_bias")
FEW: Final = 8
"""Up to how many visits sorting takes longer than reading the weights of an expert again."""
ALIGNMENT: Final = 16
"""What the bytes of a row must be a multiple of for PyTorch's grouped product."""


class SortedExperts(nn.Module):
    """Experts behind one op of ours, which PyTorch and Inductor call alike."""

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name, weight in zip(TENSORS, experts.tensors, strict=True):
            self.register_buffer(name, weight)
        self.activation = experts.activation

    def forward(
        self,
        x: Float[Tensor, "*tokens dim"],
        index: Int[Tensor, "*tokens k"],
        weight: Float[Tensor, "*tokens k"],
    ) -> Float[Tensor, "*tokens dim"]:
        weights = (getattr(self, name) for name in TENSORS)
        return torch.ops.blockwright_cpu.moe_ffn(x, index, weight, *weights, self.activation)


def by_expert(
    experts: Experts,
    x: Float[Tensor, "tokens dim"],
    index: Int[Tensor, "tokens k"],
    weight: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens dim"]:
    """Sort visits by expert; an expert takes all its tokens at once."""
    expert, order = index.reshape(-1).sort()
    ends = torch.searchsorted(
        expert, torch.arange(len(experts.up), dtype=expert.dtype), right=True, out_int32=True
    )
    rows = x.index_select(0, order // index.shape[-1])

    def layer(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = grouped_product(rows, weight, ends)
        return y if bias is None else y.add_(bias.index_select(0, expert))

    hidden, act = layer(rows, experts.up, experts.up_bias), FUNCTIONS[experts.activation]
    if experts.gate is None:
        hidden = act(hidden)
    else:
        hidden = act(layer(rows, experts.gate, experts.gate_bias)).mul_(hidden)
    answers = layer(hidden, experts.down, experts.down_bias)
    exact = torch.promote_types(x.dtype, torch.float32)
    place = order.argsort().reshape(index.shape)  # where the answer to each visit is
    shares = weight.to(exact)
    y = F.embedding_bag(place, answers.to(exact), mode="sum", per_sample_weights=shares)
    return y.to(x.dtype)


def grouped_product(
    rows: Float[Tensor, "visits in_features"],
    weight: Float[Tensor, "experts out_features in_features"],
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "visits out_features"]:
    """Multiply groups of rows, each ending at its entry of `ends`, by `weight[expert].T`."""
    widths = (size * rows.element_size() for size in weight.shape[1:])
    if rows.dtype != torch.float64 and all(width % ALIGNMENT == 0 for width in widths):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    groups = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ own.t() for part, own in zip(groups, weight.unbind(), strict=True)])


def by_visit(
    experts: Experts,
    x: Float[Tensor, "tokens dim"],
    index: Int[Tensor, "tokens k"],
    weight: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens dim"]:
    """Take visits one by one, as they come."""
    y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for token, (used, shares) in enumerate(zip(index.tolist(), weight.tolist(), strict=True)):
        row = slice(token, token + 1)
        for expert, share in zip(used, shares, strict=True):
            y[row].add_(experts.one(expert).answer(x[row]), alpha=share)
    return y.to(x.dtype)


# `define` instead of `custom_op`, and the namespace: as in `cpu_linear`.
torch.library.define(
    "blockwright_cpu::moe_ffn",
    "(Tensor x, Tensor index, Tensor weight, Tensor? gate, Tensor up, Tensor? up_bias,"
    " Tensor? gate_bias, Tensor down, Tensor? down_bias, str activation) -> Tensor",
)


@torch.library.impl("blockwright_cpu::moe_ffn", "cpu")
def _moe_ffn(x: Tensor, index: Tensor, weight: Tensor, *given: Any) -> Tensor:
    tokens = math.prod(x.shape[:-1])
    rows, chosen, shares = (t.reshape(tokens, t.shape[-1]) for t in (x, index, weight))
    route = by_visit if index.numel() <= FEW else by_expert
    return route(Experts(*given), rows, chosen, shares).reshape(x.shape)


@torch.library.register_fake("blockwright_cpu::moe_ffn")  # type: ignore[untyped-decorator]
def _(x: Tensor, index: Tensor, weight: Tensor, *given: Any) -> Tensor:
    return x.new_empty(x.shape)
