"""Attention in parts: over some of the keys each, merged exactly.

    lse_i = log sum over j in part i of exp(s_j)         out_i = sum of exp(s_j - lse_i) * v_j
    out = sum of w_i * out_i        w_i = exp(lse_i - lse)        lse = log sum of exp(lse_i)

A part without a key has zeros for `out` and minus infinity for `lse`, and weighs nothing.
`torch.ops.blockwright.block_attention` returns such parts for blocks of keys; `attend` for few
keys: pooled ones, a prefix, a text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: Values attended to, as if there were no other keys.
        lse: Natural logarithm of the sum of exponentials of the scores.
    """

    out: Float[Tensor, "*rows value_dim"]
    lse: Float[Tensor, "*rows"]


def attend(
    q: Float[Tensor, "*batch queries head_dim"],
    k: Float[Tensor, "*batch keys head_dim"],
    v: Float[Tensor, "*batch keys value_dim"],
    scale: float,
    bias: Float[Tensor, "..."] | None = None,
) -> Partial:
    """Attend to all keys given; `bias` is added to the scores, minus infinity hides a key."""
    scores = (q @ k.transpose(-2, -1)).to(sum_type(q)) * scale
    if bias is not None:
        scores = scores + bias
    peak = _finite(scores.amax(-1, keepdim=True).detach())
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    hidden = total == 0
    filled = total.masked_fill(hidden, 1.0)
    lse = (peak + filled.log()).masked_fill(hidden, -math.inf).squeeze(-1)
    return Partial((weights / filled).to(v.dtype) @ v, lse)


def merge(*parts: Partial) -> Partial:
    """Return attention over the keys of all parts, no key being in two of them."""
    peak = parts[0].lse
    for part in parts[1:]:
        peak = torch.maximum(peak, part.lse)
    peak = _finite(peak.detach())
    weights = [(part.lse - peak).exp() for part in parts]
    total = sum(weights[1:], weights[0])
    hidden = total == 0
    filled = total.masked_fill(hidden, 1.0)
    terms = [part.out * (w / filled)[..., None] for part, w in zip(parts, weights, strict=True)]
    out = sum(terms[1:], terms[0]).to(parts[0].out.dtype)
    return Partial(out, (peak + filled.log()).masked_fill(hidden, -math.inf))


def sum_type(x: Tensor) -> torch.dtype:
    """Return the type that scores and sums have: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _finite(peak: Tensor) -> Tensor:
    """Give rows without a key a largest score that can be subtracted."""
    return peak.masked_fill(peak == -math.inf, 0.0)
