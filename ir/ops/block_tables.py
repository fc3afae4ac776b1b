"""Functions of eight-bit codes, looked up in tables of 256 entries.

activation    T_s[q] = f(q 2^-s)        one row for each shift of a block
softmax       e_c = round(2^15 exp(-c / 32)),  p = e / sum(e)        c: how far below the row's
                                                                     largest score, in 32nds

Tables follow from the function and are not stored.

Source: Dong and Chen, 2023, arXiv:2304.01483 (GELU and softmax on compressed values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .block_codes import LIMITS, encode, out_of_blocks

SHIFTS: Final = (-8, 16)
"""Rows of a table: from inputs that reach 32,512 (larger ones saturate) to steps of 2^-16."""

EXPONENT_STEP: Final = 1 / 32
"""Scores are rounded to this. Keys 8 below the best one, e^-8 of its weight, have none."""

_LARGEST_CODE: Final = 255  # of a distance; stands for everything farther, masked keys included
_UNIT: Final = 2.0**15  # of the table of exponentials
_LIMIT: Final = int(LIMITS["int8"])


@torch.library.custom_op("blockwright::block_activation", mutates_args=())
def block_activation(x: Tensor, function: str, block: int) -> Tensor:
    """Apply a function to a value in blocks of int8 codes, by table.

    Args:
        x: Floating point; NaN stays NaN.
        function: A name of `ACTIVATIONS`.
        block: Numbers along the last axis that share a shift.
    """
    return spell_activation(x, function, block).contiguous()


@block_activation.register_fake
def _(x: Tensor, function: str, block: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("blockwright::block_softmax", mutates_args=())
def block_softmax(x: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return the softmax of scores over the last axis, exponentials by table.

    Args:
        x: Scores [*batch, queries, keys].
        mask: Added to the scaled scores; or, boolean, says which keys a query sees. None for all.
        causal: Whether a query sees no later key.
        scale: What scores are multiplied by.

    Returns:
        Probabilities like `x`. Keys that are masked have none; a query that sees no key has zeros.
    """
    return spell_softmax(x, mask, causal, scale).contiguous()


@block_softmax.register_fake
def _(x: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def spell_activation(x: Tensor, function: str, block: int) -> Tensor:
    """`block_activation` in ops of ATen."""
    codes, shift = encode(x, "int8", block, pow2=True)
    row = shift.clamp(*SHIFTS)
    codes = (codes * torch.exp2(row - shift)).round().clamp(-_LIMIT, _LIMIT)
    index = (row - SHIFTS[0]) * (2 * _LIMIT + 1) + codes + _LIMIT
    table = activation_table(function, x).flatten()
    found = table[out_of_blocks(index, x.shape[-1]).long()]
    return torch.where(x.isnan(), x, found.to(x.dtype))


def activation_table(function: str, like: Tensor) -> Tensor:
    """Return a function of every code at every shift: [shifts, codes]."""
    wide = torch.promote_types(like.dtype, torch.float32)
    codes = torch.arange(-_LIMIT, _LIMIT + 1, device=like.device, dtype=wide)
    shifts = torch.arange(SHIFTS[0], SHIFTS[1] + 1, device=like.device, dtype=wide)
    return ACTIVATIONS[function].value(codes * torch.exp2(-shifts)[:, None])


def spell_softmax(x: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`block_softmax` in ops of ATen."""
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if causal:
        queries, keys = (torch.arange(x.shape[axis], device=x.device) for axis in (-2, -1))
        scores = scores.masked_fill(keys > queries[:, None], -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores = scores + mask
    lowest = torch.finfo(scores.dtype).min
    peak = scores.amax(-1, keepdim=True)
    below = ((peak.clamp(min=lowest) - scores) / EXPONENT_STEP).round()
    code = below.clamp(0, _LARGEST_CODE).nan_to_num(_LARGEST_CODE).long()
    weight = exponential_table(scores)[code]
    p = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(peak.isnan(), peak, p).to(x.dtype)


def exponential_table(like: Tensor) -> Tensor:
    """Return the exponential of every code, the last of which weighs nothing: [codes]."""
    codes = torch.arange(_LARGEST_CODE + 1, device=like.device, dtype=like.dtype)
    values = torch.exp(codes * -EXPONENT_STEP).mul(_UNIT).round()
    return torch.where(codes < _LARGEST_CODE, values, torch.zeros_like(values))


def describe_activation(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say what is looked up."""
    return "activations", f"{arguments['function']} by table"


def describe_softmax(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how probabilities are computed."""
    return "softmax", "exponentials by table"


ACTIVATION = torch.ops.blockwright.block_activation.default
SOFTMAX = torch.ops.blockwright.block_softmax.default
