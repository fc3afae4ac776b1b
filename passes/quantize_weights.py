"""Store weights as low-bit integers with a scale per group.

    codes = round(w / s)      s = max|w| / 127  or  / 7, per output channel and group of inputs

Weight-only, the layer multiplies by the dequantized weight. With `activations="int8"` it also
quantizes its input, one scale per token, and multiplies integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.ops import int8_linear, packing
from ..ir.ops.quantized_linear import weight_of
from ..ir.recognize import Embedding, Linear
from .base import Pass, Promise, Skip, require_choice, selected


@dataclass(frozen=True)
class Codes:
    """How one weight is stored.

    Attributes:
        bits: Bits per code.
        group_size: Inputs that share a scale.
        symmetric: No zero point.
        activations: `int8`, or None when activations stay in floating point.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str | None = None

    def __post_init__(self) -> None:
        require_choice("quantize-weights", "bits", self.bits, (8, 4))
        if self.group_size < 1:
            raise OptionError(
                f"quantize-weights: group_size={self.group_size} holds no weight; use 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass[Linear | Embedding, Codes]):
    """Quantize the weights of linear layers, and of embedding tables when asked.

    Attributes:
        bits: 8 or 4 bits per weight. Embedding tables always take 8.
        group_size: Input features that share a scale, 1 or more; None for all of them. The last
            group of a layer may be shorter.
        symmetric: Codes around zero; False stores a zero point per group.
        activations: None leaves activations in floating point; `int8` quantizes them per token at
            run time and multiplies integers (needs bits=8, symmetric, group_size=None).
        embeddings: Also quantize embedding tables, to 8 bits with one scale per row.
        include: Glob patterns of module paths to quantize.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range, or `activations` does not go with the others.

    Source: Jacob et al., 2018, arXiv:1712.05877 (integer arithmetic); per-token scales as in
        ZeroQuant, Yao et al., 2022, arXiv:2206.01861.
    Differs: round to nearest without calibration. With `activations="int8"` weights use 7 of 8
        bits, which no x86 instruction set can overflow.
    Exact when: every weight is a multiple of its scale within the code range (weight-only).
    """

    name: ClassVar[str] = "quantize-weights"
    promise: ClassVar[Promise] = Promise.BOUNDED
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "group_size": 8, "embeddings": True},
        {"activations": "int8"},
    )
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    embeddings: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "bits", self.bits, packing.BITS)
        require_choice(self.name, "activations", self.activations, (None, "int8"))
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(
                f"quantize-weights: group_size={self.group_size} holds no weight; use 1 or more."
            )
        plain = (self.bits, self.group_size, self.symmetric) == (8, None, True)
        if self.activations == "int8" and not plain:
            raise OptionError(
                "quantize-weights: activations=int8 needs bits=8, symmetric=true and no group_size."
            )

    def ends(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude
        return frozenset({Fact.DENSE_WEIGHTS}) if everywhere else frozenset()

    def decide(self, region: Linear | Embedding) -> Codes | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if isinstance(region, Embedding) and not self.embeddings:
            return Skip("is an embedding table; set embeddings=true to quantize it", at=region)
        if region.weight_is_shared:
            return Skip("shares its weight with another place of the model", at=region)
        if isinstance(region, Linear) and region.is_router:
            return Skip("is a router, which would choose other experts", at=region)
        if not region.weight.is_floating_point():
            return Skip(f"has {region.weight.dtype} weights", at=region)
        if not region.weight.numel():
            return Skip("has no weights", at=region)
        features = region.weight.shape[1]
        if isinstance(region, Embedding):
            return Codes(8, features, True)
        group_size = min(self.group_size or features, features)
        return Codes(self.bits, group_size, self.symmetric, self.activations)

    def replace(self, region: Linear | Embedding, codes: Codes) -> nn.Module:
        if isinstance(region, Embedding):
            matrix, scale = quantize_rows(region.weight)
            return QuantizedEmbedding(matrix, scale.to(region.weight.dtype))
        if codes.activations:
            limit = int8_linear.WEIGHT_LIMIT
            matrix, scale = quantize_rows(region.weight, limit)
            return Int8Linear(matrix.t().contiguous(), scale[:, 0].contiguous(), region.bias)
        return QuantizedLinear(
            *quantize(region.weight, codes.bits, codes.group_size, codes.symmetric),
            bias=region.bias,
            bits=codes.bits,
            group_size=codes.group_size,
        )

    def predict(self, region: Linear | Embedding, codes: Codes) -> Mapping[str, int]:
        weight = region.weight
        embedding = isinstance(region, Embedding)
        rows, columns = weight.shape
        new = stored_bytes(rows, columns, codes, weight.element_size() if embedding else 4)
        return {"parameters": 0, "weight_bytes": new - weight.numel() * weight.element_size()}

    def bound(self, region: Linear | Embedding, module: nn.Module, x: Tensor) -> Tensor | None:
        if isinstance(module, QuantizedEmbedding):
            return module.scale[x] / 2
        if isinstance(module, Int8Linear):
            return int8_bound(module.codes, module.scale, x)
        assert isinstance(module, QuantizedLinear)
        return weight_only_bound(module, x)


class QuantizedLinear(nn.Module):
    """A linear layer over stored codes."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        *,
        bias: Tensor | None,
        bits: int,
        group_size: int,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.bits, self.group_size = bits, group_size

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        return torch.ops.blockwright.quantized_linear(
            x, self.codes, self.scale, self.zero_point, self.bias, self.bits, self.group_size
        )

    def dequantized(self, in_features: int) -> Float[Tensor, "in_features out_features"]:
        """Return the weight the codes stand for."""
        return weight_of(
            in_features, self.codes, self.scale, self.zero_point, self.bits, self.group_size
        )


class Int8Linear(nn.Module):
    """A linear layer in integers, activations quantized per token."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        return torch.ops.blockwright.int8_linear(x, self.codes, self.scale, self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding table over stored codes."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Tensor:
        return torch.ops.blockwright.quantized_embedding(ids, self.codes, self.scale)


def stored_bytes(rows: int, columns: int, codes: Codes, scale_bytes: int) -> int:
    """Return the bytes of a weight [rows, columns] as codes, scales and zero points."""
    groups = rows * -(-columns // codes.group_size)
    zeros = 0 if codes.symmetric else groups
    packed = sum(-(-count * codes.bits // 8) for count in (rows * columns, zeros))
    return packed + groups * scale_bytes


def quantize(
    weight: Float[Tensor, "out_features in_features"], bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return stored codes, scale [groups, out_features] and zero points of a weight.

    Codes stand as [in_features, out_features], packed for four bits; see `ir.ops.packing`.
    """
    low, high = packing.code_range(bits, symmetric)
    columns = weight.t().float()
    groups = -(-columns.shape[0] // group_size)
    padded = nn.functional.pad(columns, (0, 0, 0, groups * group_size - columns.shape[0]))
    grouped = padded.reshape(groups, group_size, -1)
    if symmetric:
        scale = _positive(grouped.abs().amax(dim=1) / high)
        zero = torch.zeros_like(scale)
    else:
        bottom, top = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
        scale = _positive(top / high - bottom / high)
        zero = torch.round(-bottom / scale).clamp(low, high)
    codes = (torch.round(grouped / scale[:, None]) + zero[:, None]).clamp(low, high)
    matrix = codes.reshape(groups * group_size, -1)[: columns.shape[0]]
    return (
        _store(matrix, bits, symmetric),
        scale,
        None if symmetric else _store(zero, bits, symmetric),
    )


def quantize_rows(
    weight: Float[Tensor, "rows columns"], limit: int = 127
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """Return symmetric int8 codes within +-`limit` and one scale per row."""
    values = weight.float()
    # Tables are large: one temporary of their size is enough.
    largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=1, keepdim=True)
    scale = _positive(largest / limit)
    codes = (values / scale).round_().clamp_(-limit, limit)
    return codes.to(torch.int8), scale


def weight_only_bound(
    module: QuantizedLinear, x: Float[Tensor, "*batch in_features"]
) -> Float[Tensor, "*batch out_features"]:
    """Sum over groups of (scale / 2) * |x|: how far rounding every weight can move an output.

    A zero point is rounded too, which can move a weight by as much again.
    """
    groups, size = module.scale.shape[0], module.group_size
    padded = nn.functional.pad(x.abs(), (0, groups * size - x.shape[-1]))
    mass = padded.unflatten(-1, (groups, size)).sum(dim=-1)
    step = module.scale.to(x.dtype) * (0.5 if module.zero_point is None else 1.0)
    return mass @ step


def int8_bound(
    codes: Tensor, scale: Tensor, x: Float[Tensor, "*batch in_features"]
) -> Float[Tensor, "*batch out_features"]:
    """Add up how far rounding weights and inputs can move an output.

    Rounding the weight moves it by at most `scale / 2 * sum|x|`, rounding the input by at most
    `step / 2 * sum|weight|`.
    """
    step, _ = int8_linear.quantize_rows(x)
    column = codes.abs().sum(dim=0).to(x.dtype) * scale
    return scale / 2 * x.abs().sum(dim=-1, keepdim=True) + step / 2 * column


def _positive(scale: Tensor) -> Tensor:
    """A group of zeros (or of numbers too small to divide) takes scale 1 and codes 0."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _store(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    if bits == 4:
        return packing.pack_nibbles(codes.to(torch.int16))
    return codes.to(packing.code_dtype(symmetric)).contiguous()
