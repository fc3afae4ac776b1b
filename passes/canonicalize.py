"""Give each idea one spelling.

    x * rsqrt(mean(x ** 2) + eps) * weight       ->  rms_norm(x, weight, eps)
    0.5 * x * (1 + tanh(...)), x * sigmoid(x)    ->  gelu(x), silu(x)
    softmax(q @ k.T * scale + mask) @ v          ->  scaled_dot_product_attention(q, k, v, mask)
    attention(q, repeat(k), repeat(v))           ->  attention(q, k, v, enable_gqa=True)
    addmm(bias, x, weight)                       ->  linear(x, weight.T, bias)

Passes and backends then need to know one form, and get the fused kernel for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.recognize import Norm
from ..ir.recognize.spelled import (
    RepeatedHeads,
    SpelledActivation,
    SpelledAttention,
    TransposedLinear,
    weights_of,
)
from .base import Pass, Promise, Skip, selected

Spelled = Norm | SpelledActivation | SpelledAttention | RepeatedHeads | TransposedLinear


@dataclass(frozen=True, kw_only=True)
class Canonicalize(
    Pass[Norm | SpelledActivation | SpelledAttention | RepeatedHeads | TransposedLinear, str]
):
    """Replace what is spelled out in several ops by the one op that means it.

    Attributes:
        include: Glob patterns of module paths to rewrite.
        exclude: Glob patterns of module paths to leave alone.

    Source: RMSNorm, Zhang and Sennrich, 2019, arXiv:1910.07467; GELU, Hendrycks and Gimpel, 2016,
        arXiv:1606.08415; attention, Vaswani et al., 2017, arXiv:1706.03762; grouped queries,
        Ainslie et al., 2023, arXiv:2305.13245.
    Exact when: always, up to the order of operations inside the op.
    """

    name: ClassVar[str] = "canonicalize"
    promise: ClassVar[Promise] = Promise.EXACT
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def decide(self, region: Spelled) -> str | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if isinstance(region, Norm):
            if not region.written_out:
                return Skip("is one op already", at=region)
            if any("to." in str(node.target) for node in region.nodes) or _mixes_types(region):
                return Skip("computes in another type than it reads", at=region)
            return "rms_norm"
        if isinstance(region, TransposedLinear):
            return "linear"
        return region.form if isinstance(region, SpelledActivation) else "attention"

    def replace(self, region: Spelled, decision: str) -> nn.Module:
        if isinstance(region, Norm):
            return RMSNorm(region.weight, region.size, region.eps)
        if isinstance(region, TransposedLinear):
            weight, bias = weights_of(region)
            return Linear(weight.t().contiguous(), bias)
        if isinstance(region, SpelledActivation):
            return Activation(region.form)
        if isinstance(region, SpelledAttention):
            return Attention({"scale": region.scale})
        return Attention(dict(region.options) | {"enable_gqa": True})


def _mixes_types(norm: Norm) -> bool:
    read = norm.inputs[0].meta["val"].dtype
    return norm.weight is not None and norm.weight.dtype != read


class RMSNorm(nn.Module):
    """Root mean square normalization in one op."""

    def __init__(self, weight: Tensor | None, size: int, eps: float | None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, [self.size], self.weight, self.eps)


class Linear(nn.Module):
    """A linear layer with its weight the usual way round."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Activation(nn.Module):
    """An activation in one op."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
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
