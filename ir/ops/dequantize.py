"""`blockwright::dequantize`: the weights of experts, stored as low-bit codes.

weight[e] = ((codes[e] - zero_point[e]) * scale[e]).T          codes[e]: [in_features, out_features]

It stands before the op that reads all of them. Backends look through it: those of an expert are
floats where that expert is multiplied, or once and for all while the program is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .quantized_linear import weight_of


@torch.library.custom_op("blockwright::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return the weights that codes of `bits` bits stand for.

    Args:
        codes: Eight bits: int8 (no zero point) or uint8, [experts, in_features, out_features].
            Four bits: uint8, [experts, bytes], those of each expert packed on their own.
        scale: [experts, ceil(in_features / group_size), out_features].
        zero_point: Codes that stand for zero, stored like `codes` with the shape of `scale`; None
            for symmetric codes.
        bits: 4 or 8.
        group_size: Input features that share a scale; the last group may be shorter.
        in_features: Width of what the weights are multiplied with.

    Returns:
        [experts, out_features, in_features], of the type of `scale`.
    """
    zeros = [None] * len(codes) if zero_point is None else list(zero_point)
    experts = zip(codes, scale, zeros, strict=True)
    return torch.stack([weight_of(in_features, *own, bits, group_size).t() for own in experts])


@dequantize.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return scale.new_empty((scale.shape[0], scale.shape[2], in_features))


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Dequantizing is not counted."""
    return {}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return math.prod(output)


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the weights are stored."""
    group, features = arguments["group_size"], arguments["in_features"]
    shared = f"group {group}" if group < features else "per channel"
    zero = "" if arguments.get("zero_point") is None else ", with zero points"
    return "experts", f"int{arguments['bits']} weights ({shared}{zero})"


OP = torch.ops.blockwright.dequantize.default
