"""Attention in which every query looks at its K nearest keys alone.

    p = softmax(q @ k.T * scale + mask)         y = (p where it is among the K largest, else 0) @ v

What is left of a row does not add up to one, on purpose: the model was trained with small weights
on far keys, and without them what is near keeps the weight it had.

Source: Nagarajan et al., AxFormer, 2020, arXiv:2010.03688 (hard attention).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from ...ir.recognize import Attention
from ...ir.recognize.calls import op
from ...ir.region_module import Call


def hard_calls(attention: Attention, top_k: int) -> dict[fx.Node, Call]:
    """Return what is called in an attention to make it hard; ask `cannot_harden` first."""
    core = attention.core
    if op(core) == "scaled_dot_product_attention":
        return {core: Call(partial(hard_attention, top_k=top_k), core.args, dict(core.kwargs))}
    (softmax,) = _softmaxes(attention)
    call = partial(hard_softmax, softmax.target, top_k)
    return {softmax: Call(call, softmax.args, dict(softmax.kwargs))}


def cannot_harden(attention: Attention, top_k: int) -> str | None:
    """Say why an attention is as it is with its `top_k` nearest keys, or cannot do with them."""
    if op(attention.core) != "scaled_dot_product_attention" and len(_softmaxes(attention)) != 1:
        return "has no softmax of its own"
    keys = attention.core.args[1] if op(attention.core) == "scaled_dot_product_attention" else None
    rows = keys if isinstance(keys, fx.Node) else _softmaxes(attention)[0]
    count = rows.meta["val"].shape[-2 if keys is not None else -1]
    if isinstance(count, int) and count <= top_k:
        return f"looks at {count} keys, {top_k} would be kept"
    return None


def hard_attention(
    query: Float[Tensor, "*batch heads queries head_dim"],
    key: Float[Tensor, "*batch kv_heads keys head_dim"],
    value: Float[Tensor, "*batch kv_heads keys value_dim"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    top_k: int,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch heads queries value_dim"]:
    """Return attention over the largest probabilities; arguments as `scaled_dot_product_attention`.

    With at least as many as there are keys it is attention as it was.
    """
    if enable_gqa:
        copies = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(copies, dim=-3) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        rows, columns = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(columns > rows[:, None], -math.inf)
    if attn_mask is None:
        return keep_largest(scores.softmax(-1), top_k) @ value
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    else:
        scores = scores + attn_mask
    hidden = scores.amax(-1, keepdim=True) == -math.inf  # all keys masked: the query gets nothing
    return keep_largest(scores.softmax(-1).masked_fill(hidden, 0.0), top_k) @ value


def hard_softmax(softmax: Any, top_k: int, *args: Any, **kwargs: Any) -> Tensor:
    """Return the largest probabilities of a softmax over the last axis."""
    return keep_largest(softmax(*args, **kwargs), top_k)


def keep_largest(p: Float[Tensor, "*rows keys"], top_k: int) -> Float[Tensor, "*rows keys"]:
    """Set all but the `top_k` largest of each row to zero; of equal ones, any."""
    keys = p.shape[-1]
    if isinstance(keys, int):
        values, index = p.topk(min(top_k, keys), dim=-1)
        return torch.zeros_like(p).scatter(-1, index, values)
    none = p.new_zeros((*p.shape[:-1], top_k))  # rows may turn out to be shorter than `top_k`
    wide = torch.cat([p, none], dim=-1)
    values, index = wide.topk(top_k, dim=-1)
    return torch.zeros_like(wide).scatter(-1, index, values)[..., :keys]


def _softmaxes(attention: Attention) -> list[fx.Node]:
    return [node for node in attention.nodes if op(node) in ("softmax", "_softmax")]
