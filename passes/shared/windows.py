"""Attention inside the windows of a token grid, head by head.

Heads may have different windows: groups of them, each with its own. Tokens in front of the grid and
behind it see all tokens, and are keys in every window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .tiling import Tiling

_NONE: Mapping[str, Any] = MappingProxyType({})
EVERYBODY = -1  # region of keys that all queries see


@dataclass(frozen=True)
class HeadGroup:
    """Heads that attend in the same windows.

    Attributes:
        heads: How many query heads.
        window: Side of a window along each axis of the grid.
        shift: Cells by which windows begin later, along each axis.
    """

    heads: int
    window: list[int]
    shift: list[int]


@dataclass(frozen=True)
class WindowPlan:
    """Which tokens of a sequence see each other, head by head.

    Attributes:
        grid: Tokens along each axis; the last axis runs fastest in the sequence.
        groups: Heads from the first to the last, group by group.
        prefix: Tokens in front of the grid, which see all tokens and are seen by all.
        suffix: Tokens behind the grid, likewise.
    """

    grid: list[int]
    groups: list[HeadGroup]
    prefix: int = 0
    suffix: int = 0


class TiledAttention(nn.Module):
    """Attention among the tokens of a window, of heads that share their windows.

    Args:
        tiling: The windows.
        others: Number of further keys, which all tokens see.
        options: Of `scaled_dot_product_attention`: `scale`, `enable_gqa`.
    """

    region: Tensor | None

    def __init__(self, tiling: Tiling, others: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.tiling, self.others, self.options = tiling, others, dict(options)
        region = tiling.regions()
        if region is not None:
            region = F.pad(region, (others, 0), value=EVERYBODY)
        self.register_buffer("region", region)

    def forward(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads others+seq head_dim"],
        value: Float[Tensor, "batch kv_heads others+seq value_dim"],
    ) -> Float[Tensor, "batch seq heads value_dim"]:
        windows = self.tiling.split(query), self._windows(key), self._windows(value)
        y = F.scaled_dot_product_attention(*windows, attn_mask=self._mask(), **self.options)
        return self.tiling.join(y, query.shape[1])

    def _windows(self, x: Float[Tensor, "batch kv_heads others+seq dim"]) -> Tensor:
        """Return the windows of keys or values, with what everybody sees in front of each."""
        if not self.others:
            return self.tiling.split(x)
        windows = self.tiling.split(x[:, :, self.others :])
        shared = x[:, :, : self.others].flatten(0, 1)
        return torch.cat([shared.expand(len(windows), -1, -1, -1), windows], dim=2)

    def _mask(self) -> Tensor | None:
        if self.region is None:
            return None
        keys, queries = self.region[:, None], self.region[:, self.others :, None]
        seen = queries == keys
        return (seen | (keys == EVERYBODY) if self.others else seen)[:, None]


class WindowedAttention(nn.Module):
    """Attention in windows that may differ from head to head.

    Args:
        plan: The windows.
        heads: Query heads.
        kv_heads: Key and value heads; see `fits_heads`.
        options: Of `scaled_dot_product_attention`: `scale`, `enable_gqa`.
    """

    def __init__(
        self, plan: WindowPlan, heads: int, kv_heads: int, options: Mapping[str, Any] = _NONE
    ) -> None:
        super().__init__()
        self.options = dict(options)
        self.prefix, self.cells = plan.prefix, math.prod(plan.grid)
        self.heads = [group.heads for group in plan.groups]
        self.kv_heads = [count * kv_heads // heads for count in self.heads]
        self.groups = nn.ModuleList(
            TiledAttention(tiling_of(plan, group), plan.prefix + plan.suffix, options)
            for group in plan.groups
        )

    def forward(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq value_dim"],
    ) -> Float[Tensor, "batch heads seq value_dim"]:
        front, behind = self.prefix, self.prefix + self.cells
        if front == 0 and behind == query.shape[2]:
            return self._within(query, key, value).transpose(1, 2)
        few = torch.cat([query[:, :, :front], query[:, :, behind:]], dim=2)
        y = F.scaled_dot_product_attention(few, key, value, **self.options).transpose(1, 2)
        ordered = [torch.cat([x[:, :, :front], x[:, :, behind:], x[:, :, front:behind]], dim=2)
                   for x in (key, value)]  # fmt: skip
        z = self._within(query[:, :, front:behind], *ordered)
        return torch.cat([y[:, :front], z, y[:, front:]], dim=1).transpose(1, 2)

    def _within(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> Float[Tensor, "batch cells heads value_dim"]:
        """Attend within windows, group of heads by group of heads."""
        if len(self.groups) == 1:
            whole: Tensor = self.groups[0](query, key, value)
            return whole
        shares = zip(
            query.split(self.heads, dim=1),
            key.split(self.kv_heads, dim=1),
            value.split(self.kv_heads, dim=1),
            strict=True,
        )
        parts = [group(*share) for group, share in zip(self.groups, shares, strict=True)]
        return torch.cat(parts, dim=2)


def fits_heads(groups: Sequence[int], heads: int, kv_heads: int) -> bool:
    """Whether groups of query heads are whole groups of key and value heads as well."""
    return all(count * kv_heads % heads == 0 for count in groups)


def tiling_of(plan: WindowPlan, group: HeadGroup) -> Tiling:
    """Return the windows of a group of heads."""
    return Tiling(tuple(plan.grid), tuple(group.window), tuple(group.shift))


def grid_of(tokens: int, grid: Sequence[int], prefix: int, suffix: int) -> list[int] | str:
    """Return the grid that tokens stand on, a square if none is given, or why there is none.

    Returns:
        Tokens along each axis; or a reason that completes the sentence "the attention ...".
    """
    cells, others = tokens - prefix - suffix, prefix + suffix
    beside = f" and {others} more" if others else ""
    if grid:
        sides = " x ".join(map(str, grid))
        known = f"has {tokens} tokens, and not the {sides} of the grid{beside}"
        return list(grid) if math.prod(grid) == cells else known
    side = math.isqrt(max(cells, 0))
    if cells < 1 or side**2 != cells:
        return f"has {tokens} tokens, no square of them{beside}; give a grid or prefix"
    return [side, side]
