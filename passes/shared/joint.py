"""Attention in two parts that add up: directly within a chunk, linearly over the whole sequence.

    local    relu(q @ k.T / chunk)^2 @ v               tokens of the same chunk
    linear   q' @ (k'.T @ v) / seq                     all tokens
    causal   q' @ sum of (k'.T @ v) / chunk            tokens of all chunks before

Nothing is normalised: a row of zeros leaves the linear part alone.

Source: Zhao and Ma, MossFormer, 2023, arXiv:2302.11824, with its released code; Hua et al., FLASH,
    2022, arXiv:2202.10447 (mixed chunk attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .cores import heads_of

TINY = 1e-12


class Sides(NamedTuple):
    """Queries and keys of both parts.

    Attributes:
        query: Of the local part.
        linear_query: Of the linear part.
        key: Of the local part.
        linear_key: Of the linear part.
    """

    query: Float[Tensor, "*batch seq head_dim"]
    linear_query: Float[Tensor, "*batch seq head_dim"]
    key: Float[Tensor, "*batch seq head_dim"]
    linear_key: Float[Tensor, "*batch seq head_dim"]


class JointCore(nn.Module):
    """Joint attention in the place of softmax attention.

    Args:
        local: Factor of the local part, per head, not negative.
        linear: Factor of the linear part, per head.
        width: Width of a query head.
        chunk: Tokens of a chunk.
        causal: Whether tokens see none that come later.
    """

    def __init__(
        self,
        local: Float[Tensor, " heads"],
        linear: Float[Tensor, " heads"],
        width: int,
        chunk: int,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        self.chunk, self.causal = chunk, causal
        root = local.clamp_min(TINY) ** 0.25  # of queries and of keys, and scores are squared
        gains = torch.stack((root, torch.ones_like(root), root, linear))[..., None, None]
        gain = gains.expand(-1, -1, 1, width).clone()
        self.gain = nn.Parameter(gain, requires_grad=False)
        self.shift = nn.Parameter(torch.zeros_like(gain), requires_grad=False)

    def forward(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq value_dim"],
    ) -> Float[Tensor, "batch heads seq value_dim"]:
        key, value = heads_of(query, key), heads_of(query, value)
        both = (query, query, key, key)
        sides = Sides(*(x * self.gain[i] + self.shift[i] for i, x in enumerate(both)))
        return joint_attention(sides, value, self.chunk, causal=self.causal)


def joint_attention(
    sides: Sides, value: Float[Tensor, "*batch seq value_dim"], chunk: int, *, causal: bool = False
) -> Float[Tensor, "*batch seq value_dim"]:
    """Return both parts, added; the last chunk may be short."""
    seq = value.shape[-2]
    q, linear_q, k, linear_k, v = (_chunks(x, chunk) for x in (*sides, value))
    scores = F.relu(q @ k.mT / chunk).square()
    y = (scores.tril() if causal else scores) @ v
    states = linear_k.mT @ v  # [..., chunks, head_dim, value_dim]
    if causal:
        y = y + linear_q @ ((states.cumsum(-3) - states) / chunk)
    else:
        y = y + linear_q @ (states.sum(-3, keepdim=True) / seq)
    return y.flatten(-3, -2)[..., :seq, :]


def _chunks(x: Float[Tensor, "*batch seq dim"], chunk: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[-2] % chunk)).unflatten(-2, (-1, chunk))


def factors(
    sides: Sides, value: Tensor, target: Tensor, chunk: int, *, causal: bool
) -> Float[Tensor, "heads 2"]:
    """Return the factors of the local and the linear part that come nearest to a target.

    Least squares per head, over samples and tokens; the local factor is not negative.
    """
    none = torch.zeros_like(sides.query), torch.zeros_like(sides.key)
    local = sides._replace(linear_query=none[0], linear_key=none[1])
    linear = sides._replace(query=none[0], key=none[1])
    parts = [joint_attention(s, value, chunk, causal=causal) for s in (local, linear)]
    columns = torch.stack([part.double().transpose(0, 1).flatten(1) for part in parts], dim=-1)
    wanted = target.double().transpose(0, 1).flatten(1).unsqueeze(-1)
    gram, moment = columns.mT @ columns, columns.mT @ wanted  # [heads, 2, 2], [heads, 2, 1]
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] + 1e-30
    both = torch.linalg.solve(gram + ridge * torch.eye(2).to(gram), moment)[..., 0]
    alone = moment[:, 1, 0] / (gram[:, 1, 1] + 1e-30)
    without = torch.stack((torch.zeros_like(alone), alone), dim=-1)
    return torch.where(both[:, :1] > 0, both, without)
