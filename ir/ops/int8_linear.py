"""`blockwright::int8_linear`: integer matrix product, activations quantized per token as they come.

s = max|x| / 127 per token        y = (round(x / s) @ codes) * s * scale + bias
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import quantized_linear as _weight_only

WEIGHT_LIMIT = 64
"""Largest |code| of a weight: without VNNI, x86 adds two u8 x s8 products in 16 bits, and codes up
to 64 can never saturate there (255 * 64 * 2 = 32640 < 2**15)."""


@torch.library.custom_op("blockwright::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer in eight-bit integers.

    Args:
        x: [*batch, in_features], floating point; each row gets its own scale at run time.
        codes: int8 [in_features, out_features], within -64..64.
        scale: [out_features].
        bias: [out_features] or None.

    Returns:
        [*batch, out_features], of the type of `x`. Sums are exact for any in_features.
    """
    step, quantized = quantize_rows(x)
    # Sums below 2**24 are exact in fp32, which is twice as fast.
    small = codes.shape[0] * 127 * WEIGHT_LIMIT < 2**24
    exact = torch.promote_types(x.dtype, torch.float32 if small else torch.float64)
    total = quantized.to(exact) @ codes.to(exact)
    y = total.to(torch.promote_types(x.dtype, torch.float32)) * step * scale
    return (y if bias is None else y + bias).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each row, [*batch, 1], and its codes within -127..127 as floats."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, torch.round(x / step)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two integer operations per multiply-add, counted like FLOPs."""
    return _weight_only.flops(shapes, output)


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return _weight_only.weights(shapes, output)


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the layer multiplies."""
    return "linear layers", "int8 weights and activations"


OP = torch.ops.blockwright.int8_linear.default
