"""Attention in pieces as a module: in the order of tiles, and dense while a sampler warms up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .pieces import Pieces, piecewise
from .tiles import Tiling


class InPieces(nn.Module):
    """Attention in pieces, tokens of an image in the order of tiles.

    Args:
        pieces: What is exact, and what becomes of the rest.
        tiling: How tokens are reordered before, and put back after.
    """

    def __init__(self, pieces: Pieces, tiling: Tiling) -> None:
        super().__init__()
        self.pieces, self.tiling = pieces, tiling

    def forward(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch kv_heads tokens head_dim"],
        v: Float[Tensor, "batch kv_heads tokens value_dim"],
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        q, k, v = (self.tiling.to_tiles(x) for x in (q, k, v))
        return self.tiling.to_rows(piecewise(q, k, v, self.pieces))


class WarmedUp(nn.Module):
    """Dense attention on the first steps, attention in pieces on the others.

    Args:
        pieces: Attention in pieces.
        options: Of dense attention.
        dense_steps: How many steps are dense.
        steps: How many there are.
    """

    dense: Bool[Tensor, " steps"]

    def __init__(
        self, pieces: InPieces, options: Mapping[str, Any], dense_steps: int, steps: int
    ) -> None:
        super().__init__()
        self.pieces, self.options = pieces, dict(options)
        self.register_buffer("dense", torch.arange(steps) < dense_steps)

    def forward(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch kv_heads tokens head_dim"],
        v: Float[Tensor, "batch kv_heads tokens value_dim"],
        step: Int[Tensor, ""],
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **self.options).contiguous()

        def few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.pieces(q, k, v).contiguous()

        flag = torch.ops.aten.index.Tensor(self.dense, [step])
        operands = tuple(x.contiguous() for x in (q, k, v))  # compiled branches take that as given
        out: Tensor = torch.cond(flag, whole, few, operands)
        return out
