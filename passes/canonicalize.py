"""Give each idea one spelling.

    x * rsqrt(mean(x ** 2) + eps) * weight       ->  rms_norm(x, weight, eps), or layer_norm
    0.5 * x * (1 + tanh(...)), x * sigmoid(x)    ->  gelu(x), silu(x)
    softmax(q @ k.T * scale + mask) @ v          ->  scaled_dot_product_attention(q, k, v, mask)
    attention(q, repeat(k), repeat(v))           ->  attention(q, k, v, enable_gqa=True)
    addmm(bias, x, weight), x @ weight           ->  linear(x, weight.T, bias)
    linear(cat([attended, hidden]), weight)      ->  linear(attended, ...) + linear(hidden, ...)
    qkv.chunk(3, -1), qkv.view(..).unbind(2)     ->  qkv.split([dim, dim, dim], -1)
    x[..., [-1], :]                              ->  x[..., -1:, :]

Passes and backends then need to know one form, and get the fused kernel for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.facts import Fact
from ..ir.recognize import Norm
from ..ir.recognize.core import Core
from ..ir.recognize.parted import PartedLayer
from ..ir.recognize.picked import PickedPosition
from ..ir.recognize.repeated import RepeatedHeads
from ..ir.recognize.spelled import (
    SharedOutput,
    SpelledActivation,
    SpelledAttention,
    TransposedLinear,
)
from .base import Pass, Promise, Skip, selected

Spelled = (
    Norm
    | SpelledActivation
    | SpelledAttention
    | RepeatedHeads
    | TransposedLinear
    | SharedOutput
    | PartedLayer
    | PickedPosition
)


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass[Spelled, str]):
    """Replace what is spelled out in several ops by the one op that means it.

    Attributes:
        include: Glob patterns of module paths to rewrite.
        exclude: Glob patterns of module paths to leave alone.

    Source: RMSNorm, Zhang and Sennrich, 2019, arXiv:1910.07467; GELU, Hendrycks and Gimpel, 2016,
        arXiv:1606.08415; attention, Vaswani et al., 2017, arXiv:1706.03762; grouped queries,
        Ainslie et al., 2023, arXiv:2305.13245.
    Exact when: always, up to the order of operations inside the op; but a query whose keys are all
        hidden behind minus infinity, which was NaN, becomes zero.
    """

    name: ClassVar[str] = "canonicalize"
    promise: ClassVar[Promise] = Promise.EXACT
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def establishes(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude
        return frozenset({Fact.CANONICAL}) if everywhere else frozenset()

    def decide(self, region: Spelled) -> str | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if isinstance(region, Norm):
            if not region.written_out:
                return Skip("is one op already", at=region)
            if any("to." in str(node.target) for node in region.nodes) or _mixes_types(region):
                return Skip("computes in another type than it reads", at=region)
            return region.form
        if isinstance(region, SpelledAttention | TransposedLinear | SharedOutput) and region.gap:
            return Skip(region.gap, at=region)
        if isinstance(region, TransposedLinear):
            return "linear"
        if isinstance(region, SharedOutput):
            return "linears"
        if isinstance(region, PartedLayer):
            return "split"
        if isinstance(region, PickedPosition):
            return f"slice at {region.position}"
        return region.form if isinstance(region, SpelledActivation) else "attention"

    def replace(self, region: Spelled, decision: str) -> nn.Module:
        if isinstance(region, Norm):
            if region.form == "layer_norm":
                return LayerNorm(region.weight, region.bias, region.size, region.eps)
            return RMSNorm(region.weight, region.size, region.eps)
        if isinstance(region, TransposedLinear):
            return Linear(region.weight, region.bias)
        if isinstance(region, SharedOutput):
            return Linears(region.layer.weight, region.layer.bias, region.widths)
        if isinstance(region, PartedLayer):
            return Split(region.widths, region.inner, region.picks)
        if isinstance(region, PickedPosition):
            return Slice(region.axis, region.position)
        if isinstance(region, SpelledActivation):
            return Activation(region.form)
        if isinstance(region, SpelledAttention):
            return MaskedAttention(region.core)
        return Attention(dict(region.options) | {"enable_gqa": True})


def _mixes_types(norm: Norm) -> bool:
    read = norm.inputs[0].meta["val"].dtype
    return any(w is not None and w.dtype != read for w in (norm.weight, norm.bias))


class RMSNorm(nn.Module):
    """Root mean square normalization in one op."""

    def __init__(self, weight: Tensor | None, size: int, eps: float | None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, [self.size], self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalization in one op."""

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, size: int, eps: float | None
    ) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.size, self.eps = size, eps or 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, [self.size], self.weight, self.bias, self.eps)


class Linear(nn.Module):
    """A linear layer with its weight the usual way round."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Linears(nn.Module):
    """The sum of one linear layer per input, cut from a layer that reads them side by side."""

    def __init__(self, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> None:
        super().__init__()
        first, *others = weight.split(list(widths), dim=1)
        self.first = Linear(first.contiguous(), bias)
        self.others = nn.ModuleList(Linear(other.contiguous(), None) for other in others)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        for layer, other in zip(self.others, others, strict=True):
            y = y + layer(other)
        return y


class Split(nn.Module):
    """Parts of the last axis, each laid out as heads or left as it is."""

    def __init__(self, widths: Sequence[int], inner: Sequence[int], picks: Sequence[int]) -> None:
        super().__init__()
        self.widths, self.inner, self.picks = list(widths), list(inner), list(picks)

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        parts = y.split(self.widths, dim=-1)
        found = [parts[index] for index in self.picks]
        return tuple(x.unflatten(-1, self.inner) if self.inner else x for x in found)


class Slice(nn.Module):
    """One position of an axis, which keeps its place."""

    def __init__(self, axis: int, position: int) -> None:
        super().__init__()
        stop = position + 1 or None  # -1 is the last position
        self.places = (*(slice(None),) * axis, slice(position, stop))

    def forward(self, x: Tensor) -> Tensor:
        return x[self.places]


class Activation(nn.Module):
    """An activation in one op, or in the shortest spelling where there is none."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "quick_gelu":
            return x * torch.sigmoid(x * 1.702)
        if self.form == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.form == "gelu_tanh" else "none")


class Attention(nn.Module):
    """Attention in one op."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = sorted(options.items())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **dict(self.options))


class MaskedAttention(nn.Module):
    """Attention in one op, its masks put into the one form the op takes."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        axes = [list(order) for order in core.orders] if core.orders else []
        self.axes = axes[:3]
        self.result = sorted(range(len(axes[3])), key=axes[3].__getitem__) if axes else []
        self.forms = [(term.form, term.value) for term in core.terms]
        self.scale = core.scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        if self.axes:
            q, k, v = (x.permute(order) for x, order in zip((q, k, v), self.axes, strict=True))
        mask = self.mask(q.dtype, masks)
        shared = {"enable_gqa": True} if k.dim() == 4 and k.shape[1] != q.shape[1] else {}
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, **shared)
        return y.permute(self.result) if self.result else y

    def mask(self, dtype: torch.dtype, masks: Sequence[Tensor]) -> Tensor | None:
        """Return what is added to the scores, or which scores stay."""
        if not masks:
            return None
        form, value = self.forms[0]
        if len(masks) == 1 and form != "add" and value == -math.inf:
            return masks[0] if form == "keep" else ~masks[0]
        added = []
        for mask, (form, value) in zip(masks, self.forms, strict=True):
            if form != "add":
                dropped = ~mask if form == "keep" else mask
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(dropped, value)
            added.append(mask)
        return sum(added[1:], added[0])
