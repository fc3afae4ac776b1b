"""`blockwright::quantized_embedding`: look up rows of a table stored as int8 codes.

y[i] = codes[ids[i]] * scale[ids[i]]                     codes: [vocab, dim]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("blockwright::quantized_embedding", mutates_args=())
def quantized_embedding(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Look up rows of a quantized table.

    Args:
        ids: [*batch], integers within 0..vocab-1.
        codes: int8 [vocab, dim].
        scale: [vocab, 1], one per row.

    Returns:
        [*batch, dim], of the type of `scale`.
    """
    return codes[ids].to(scale.dtype) * scale[ids]


@quantized_embedding.register_fake
def _(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*ids.shape, codes.shape[1]))


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """One multiplication per element read."""
    return {"elementwise": math.prod(output)}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Count the weights the codes stand for."""
    return math.prod(shapes[1])


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how the table is stored."""
    return "embedding tables", "int8 rows"


OP = torch.ops.blockwright.quantized_embedding.default
