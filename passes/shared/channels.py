"""Attention whose tokens are the channels of a head, and whose features are the tokens.

    A = relu(temperature * normalise(q).T @ normalise(k))       [head_dim, head_dim]
    y = v @ A.T                                                 columns of q and k have length one

Lengths and products are sums over the sequence, so they depend on how long it is. Runs of a fixed
length, which overlap where they do not fit, keep them as they were; what overlaps is averaged.

Source: Li et al., DLGSANet, 2023, arXiv:2301.02031, with its released code; Zamir et al., 2022,
    arXiv:2111.09881 (attention of channels); Chu et al., 2022, arXiv:2112.04491 (runs).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .cores import heads_of

TINY = 1e-12


class ChannelCore(nn.Module):
    """Attention of channels in the place of attention of tokens.

    Args:
        temperature: Factor of the scores, per head.
        tile: Tokens of a run; None for the whole sequence.
        seq: Tokens of the sequence; None where it may change, and then there is no tile.
    """

    index: Tensor | None
    places: Tensor | None

    def __init__(
        self, temperature: Float[Tensor, " heads"], tile: int | None = None, seq: int | None = None
    ) -> None:
        super().__init__()
        self.temperature = nn.Parameter(temperature[:, None, None].clone(), requires_grad=False)
        index = None if tile is None or seq is None or seq <= tile else runs(seq, tile)
        places = None if index is None or seq is None else where(index, seq)
        self.register_buffer("index", index if index is None else index.to(temperature.device))
        self.register_buffer("places", places if places is None else places.to(temperature.device))

    def forward(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        key, value = heads_of(query, key), heads_of(query, value)
        if self.index is None or self.places is None:
            return attend_channels(query, key, value, self.temperature)
        many, each = self.index.shape
        parts = (x.index_select(2, self.index.flatten()) for x in (query, key, value))
        q, k, v = (part.unflatten(2, (many, each)).transpose(1, 2) for part in parts)
        y = attend_channels(q, k, v, self.temperature).transpose(1, 2).flatten(2, 3)
        first, last = (y.index_select(2, place) for place in self.places)
        return (first + last) / 2


def attend_channels(
    query: Float[Tensor, "*batch seq head_dim"],
    key: Float[Tensor, "*batch seq head_dim"],
    value: Float[Tensor, "*batch seq head_dim"],
    temperature: Float[Tensor, "heads 1 1"],
) -> Float[Tensor, "*batch seq head_dim"]:
    """Return attention of channels; those that are alike are mixed, others never."""
    scores = F.normalize(query, dim=-2).mT @ F.normalize(key, dim=-2)
    return value @ F.relu(scores * temperature).mT


def nearest_temperature(
    query: Tensor, key: Tensor, value: Tensor, target: Tensor
) -> Float[Tensor, " heads"]:
    """Return the temperatures whose attention comes nearest to a target, none of them negative."""
    ones = torch.ones(query.shape[1], 1, 1).to(query)
    y, wanted = (
        x.double().transpose(0, 1).flatten(1)
        for x in (attend_channels(query, key, value, ones), target)
    )
    best = (y * wanted).sum(1) / y.square().sum(1).clamp_min(TINY)
    return best.clamp_min(0)


def runs(seq: int, tile: int) -> Int[Tensor, "runs tile"]:
    """Return the tokens of each run: as few runs as cover the sequence, the last at its end."""
    count = -(-seq // tile)
    starts = torch.linspace(0, seq - tile, count).round().long()
    return starts[:, None] + torch.arange(tile)


def where(index: Int[Tensor, "runs tile"], seq: int) -> Int[Tensor, "2 seq"]:
    """Return the first and the last place of each token among all runs, the same where one."""
    flat = index.flatten()
    order = torch.arange(len(flat))
    first = torch.full((seq,), len(flat)).scatter_reduce(0, flat, order, "amin")
    last = torch.full((seq,), -1).scatter_reduce(0, flat, order, "amax")
    return torch.stack((first, last))
