"""Hashing by signs: which row of each table a vector addresses, and how much that row counts.

    z = x cut into chunks of `bits` elements, one chunk per table
    code  = sum over i of  [z_i >= 0] * 2 ** (bits - 1 - i)         the first element counts most
    score = |z|_1 / prod over i of (1 + exp(-2 |z_i|))              `l1_softmax`
    score =     1 / prod over i of (1 + exp(-2 |z_i|))              `softmax`

The softmax score is exp(<z, t>) of the signs t of z, divided by its sum over all sign vectors: how
sure the code is. A code has no gradient; the score carries all of it.

Source: Ding et al., MemoryFormer, 2024, arXiv:2411.12992; the score times |z|_1 is that of the code
released with it (github.com/C0-Design/MemoryFormer), after Zeng et al., LookupFFN, 2023.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCORES: Final = ("l1_softmax", "softmax")


def hashed(
    x: Float[Tensor, "*batch dim"], bits: int, score: str
) -> tuple[Int[Tensor, "*batch tables"], Float[Tensor, "*batch tables"]]:
    """Return codes and scores, in fp32 or in fp64 for fp64.

    Args:
        x: What is hashed; `dim` is a multiple of `bits`.
        bits: Elements of a chunk, 1 or more.
        score: One of `SCORES`.
    """
    z = chunks(x, bits)
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=x.device)
    code = ((z >= 0) * powers).sum(dim=-1)
    size = z.abs()
    sure = torch.sigmoid(2 * size).prod(dim=-1)
    return code, sure if score == "softmax" else size.sum(dim=-1) * sure


def score_gradient(
    grad: Float[Tensor, "*batch tables"], x: Float[Tensor, "*batch dim"], bits: int, score: str
) -> Float[Tensor, "*batch dim"]:
    """Return the gradient of x from that of the scores."""
    z = chunks(x, bits)
    size = z.abs()
    sure = torch.sigmoid(2 * size)
    slope = 2 * (1 - sure)  # of log(sure), element by element
    if score == "l1_softmax":
        slope = 1 + slope * size.sum(dim=-1, keepdim=True)
    whole = grad[..., None] * sure.prod(dim=-1, keepdim=True) * slope * z.sign()
    return whole.flatten(-2).to(x.dtype)


def rows_of(code: Int[Tensor, "*batch tables"], bits: int) -> Int[Tensor, "*batch tables"]:
    """Return the rows that codes address when all tables stand below each other."""
    return code + 2**bits * torch.arange(code.shape[-1], device=code.device)


def chunks(x: Float[Tensor, "*batch dim"], bits: int) -> Float[Tensor, "*batch tables bits"]:
    """Cut vectors, in fp32 or in fp64 for fp64: scores grow with the number of bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, bits))
