"""What stands in the place of layers whose weights are codes, and how far it may be off."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...ir.ops import int8_linear
from ...ir.ops.quantized_linear import weight_of
from .codes import Stored


class QuantizedLinear(nn.Module):
    """A linear layer over stored codes.

    Args:
        stored: Codes of the weight.
        bias: [out_features], or None.
        bits: Bits per code.
        group_size: Inputs that share a scale.
        factor: [in_features], what inputs are multiplied with before the codes; None for 1.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    factor: Tensor | None

    def __init__(
        self,
        stored: Stored,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)
        self.register_buffer("factor", factor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.bits, self.group_size = bits, group_size

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Tensor:
        if self.factor is not None:
            x = x * self.factor
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


class QuantizedExperts(nn.Module):
    """A matrix of every expert, made of stored codes.

    Args:
        stored: Codes, experts along the first axis.
        bits: Bits per code.
        group_size: Inputs that share a scale.
        in_features: Columns of the matrix of an expert.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, stored: Stored, bits: int, group_size: int, in_features: int) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)
        self.bits, self.group_size, self.in_features = bits, group_size, in_features

    def forward(self) -> Float[Tensor, "experts out_features in_features"]:
        return torch.ops.blockwright.dequantize(
            self.codes, self.scale, self.zero_point, self.bits, self.group_size, self.in_features
        )


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


def experts_bound(module: QuantizedExperts) -> Float[Tensor, "experts out_features in_features"]:
    """Return how far rounding can move every weight; see `weight_only_bound`."""
    step = module.scale * (0.5 if module.zero_point is None else 1.0)
    return step.repeat_interleave(module.group_size, 1)[:, : module.in_features].transpose(1, 2)


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
