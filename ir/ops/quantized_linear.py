"""`blockwright::quantized_linear`: a linear layer whose weight is stored as low-bit codes.

y = x @ ((codes - zero_point) * scale) + bias          codes: [in_features, out_features]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .packing import dequantize, unpack


@torch.library.custom_op("blockwright::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Apply a linear layer with a weight of `bits` bits, one scale per group of input features.

    Args:
        x: [*batch, in_features], floating point.
        codes: Eight bits: int8 (no zero point) or uint8, [in_features, out_features]. Four bits:
            uint8, flat, two codes to a byte; see `packing`.
        scale: [ceil(in_features / group_size), out_features].
        zero_point: Codes that stand for zero, stored like `codes` with the shape of `scale`; None
            for symmetric codes.
        bias: [out_features] or None.
        bits: 4 or 8.
        group_size: Input features that share a scale; the last group may be shorter.

    Returns:
        [*batch, out_features], of the type of `x`.
    """
    weight = weight_of(x.shape[-1], codes, scale, zero_point, bits, group_size)
    y = x @ weight.to(x.dtype)
    return y if bias is None else y + bias


def weight_of(
    in_features: int,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return the weight [in_features, out_features] that the codes stand for."""
    signed = zero_point is None
    matrix = unpack(codes, (in_features, scale.shape[1]), bits, signed=signed)
    zeros = None
    if zero_point is not None:
        zeros = unpack(zero_point, tuple(scale.shape), bits, signed=False)
    return dequantize(matrix, scale, zeros, group_size)


@quantized_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[1]))


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two FLOPs per multiply-add; dequantizing is not counted."""
    return {"linear": 2 * math.prod(output) * shapes[0][-1]}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return shapes[0][-1] * output[-1]


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the weight is stored."""
    group, features = arguments["group_size"], arguments["x"].shape[-1]
    shared = f"group {group}" if group < features else "per channel"
    zero = "" if arguments.get("zero_point") is None else ", with zero points"
    return "linear layers", f"int{arguments['bits']} weights ({shared}{zero})"


OP = torch.ops.blockwright.quantized_linear.default
