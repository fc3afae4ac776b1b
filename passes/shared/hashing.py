"""Attention by codes: queries and keys become rows of -1 and 1, and cost is linear in tokens.

    h(x) = sign(A @ (exp(-|x - anchors|^2 / (2 sigma)) - means))             in {-1, 1}^bits
    o_i = sum_j (h_i . h_j + c) v_j / sum_j (h_i . h_j + c)                  c = bits + 1
        = (h_i @ sum_j h_j v_j^T + c sum_j v_j) / (h_i @ sum_j h_j + c seq)

Tokens have length one before they are compared with anchors. Weights lie between 1 and 2 bits + 1.

Source: Liu et al., EcoFormer, 2022, arXiv:2209.09004, with its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .cores import heads_of

TINY = 1e-6


class Hash(NamedTuple):
    """A hash function per head.

    Attributes:
        anchors: Tokens of length one that others are compared with.
        means: What is taken off the features.
        planes: A, whose signs are the bits.
    """

    anchors: Float[Tensor, "heads anchors head_dim"]
    means: Float[Tensor, "heads 1 anchors"]
    planes: Float[Tensor, "heads bits anchors"]


class HashedCore(nn.Module):
    """Attention by codes, in the place of softmax attention.

    Args:
        function: How tokens become codes.
        released: Weigh the query's own value by c * seq, as the released code does, instead of all
            values by c.
    """

    anchors: Tensor
    means: Tensor
    planes: Tensor

    def __init__(self, function: Hash, *, released: bool = False) -> None:
        super().__init__()
        self.released = released
        for name, tensor in function._asdict().items():
            self.register_buffer(name, tensor)

    def forward(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        queries, keys = query.shape[2], key.shape[2]
        together = query if query is key else torch.cat((query, heads_of(query, key)), dim=2)
        near = features(together, self.anchors)
        codes = binary((near - self.means) @ self.planes.mT)
        return attend_by_codes(
            codes[:, :, :queries], codes[:, :, -keys:], heads_of(query, value),
            released=self.released,
        )  # fmt: skip


def attend_by_codes(
    query: Float[Tensor, "*batch queries bits"],
    key: Float[Tensor, "*batch keys bits"],
    value: Float[Tensor, "*batch keys value_dim"],
    *,
    released: bool = False,
) -> Float[Tensor, "*batch queries value_dim"]:
    """Return attention by codes; sums are means over keys, which half precision can hold."""
    keys, offset = key.shape[-2], query.shape[-1] + 1
    state = (key / keys).mT @ value  # [..., bits, value_dim]
    total = query @ key.mean(-2).unsqueeze(-1) + offset
    rest = value / keys if released else value.mean(-2, keepdim=True)
    return (query @ state + offset * rest) / total


def features(
    x: Float[Tensor, "*batch seq head_dim"], anchors: Float[Tensor, "heads anchors head_dim"]
) -> Float[Tensor, "*batch seq anchors"]:
    """Return the kernel between tokens, scaled to length one, and anchors.

    Sigma is the mean squared distance between the tokens there are and the anchors.
    """
    apart = 2 - 2 * F.normalize(x, dim=-1) @ anchors.mT
    width = apart.mean((-2, -1), keepdim=True).clamp_min(TINY)
    return torch.exp(-apart / (2 * width))


def binary(x: Tensor) -> Tensor:
    """Return signs, 1 for zero; gradients pass where |x| < 1, as if nothing had happened."""
    soft = x.clamp(-1, 1)
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype) + (soft - soft.detach())
