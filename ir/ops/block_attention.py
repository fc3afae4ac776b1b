"""`blockwright::block_attention`: attention in which a block of queries sees a few blocks of keys.

    out = softmax(scale * q @ k[seen].T) @ v[seen]        lse = log sum exp(scale * q @ k[seen].T)

`blocks` lists, for each block of queries, the blocks of keys it sees. Nothing else is multiplied:
cost grows with the number of blocks listed, not with the number of keys. With `lse`, results over
different keys of the same queries merge exactly.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ...kernels.block_attention import Cut, attend, attend_backward

_FUSED: Final = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("blockwright::block_attention", mutates_args=())
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from every block of queries to the blocks of keys listed for it.

    Args:
        q: [batch, heads, queries, head_dim], floating point.
        k: [batch, kv_heads, keys, head_dim]; `heads` is a multiple of `kv_heads`.
        v: [batch, kv_heads, keys, value_dim].
        blocks: int64 [batch or 1, heads or 1, ceil(queries / query_block), kept], within
            0..ceil(keys / key_block)-1 in any order, no block twice for one row; -1 for none.
        query_block: Queries that see the same blocks, 1 or more; the last block may be shorter.
        key_block: Keys of a block, 1 or more; the last block may be shorter.
        scale: What scores are multiplied by.
        causal: Whether query i sees keys up to `keys - queries + i` only.

    Returns:
        The values attended to, [batch, heads, queries, value_dim] of the type of `q`, and the
        natural logarithm of the sum of exponentials, [batch, heads, queries] in fp32, or fp64 for
        fp64. A query that sees nothing gets zeros and minus infinity.
    """
    return attend(q, k, v, blocks, Cut(query_block, key_block, scale, causal))


@block_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), _like_lse(q)


@block_attention.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    cut = Cut(query_block, key_block, scale, causal)
    if q.dtype not in _FUSED or not importlib.util.find_spec("triton"):
        return attend(q, k, v, blocks, cut)
    from ...kernels import block_attention_triton

    return block_attention_triton.attend(q, k, v, blocks, cut)


@torch.library.custom_op("blockwright::block_attention_backward", mutates_args=())
def block_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    cut = Cut(query_block, key_block, scale, causal)
    return attend_backward((d_out, d_lse), q, k, v, blocks, (out, lse), cut)


@block_attention_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, *ctx.cut = inputs
    ctx.save_for_backward(q, k, v, blocks, *output)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.blockwright.block_attention_backward
    gradients = backward(d_out, d_lse, *ctx.saved_tensors, *ctx.cut)
    return (*gradients, None, None, None, None, None)


block_attention.register_autograd(_backward, setup_context=_remember)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do the same with all scores and a mask; slow, for comparison."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT) * scale
    row, column = (torch.arange(n, device=q.device) for n in scores.shape[2:])
    listed = blocks[:, :, row // query_block]  # [batch or 1, heads or 1, queries, kept]
    seen = (listed[..., None] == column // key_block).any(-2)
    if causal:
        seen = seen & (column - len(column) <= row[:, None] - len(row))
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num(0.0) @ v, lse


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...], key_block: int) -> dict[str, int]:
    """Two FLOPs per multiply-add of every query with the listed keys and with their values."""
    (*batch, queries, head_dim), (*_, keys, value_dim), (*_, kept) = shapes[0], *shapes[2:4]
    seen = min(kept * key_block, keys)
    return {"attention": 2 * math.prod(batch) * queries * seen * (head_dim + value_dim)}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """There are no weights."""
    return 0


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how many blocks of which size a block of queries sees."""
    kept, size = arguments["blocks"].shape[-1], arguments["key_block"]
    return "attention", f"{kept} blocks of {size} keys"


def _like_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


OP = torch.ops.blockwright.block_attention.default
