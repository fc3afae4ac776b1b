"""Attention between projected values, as ops: the other half of `Heads` in `build_module`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .build_layers import END, norm
from .configs import AttentionConfig
from .graph_builder import GraphBuilder

aten = torch.ops.aten


def heads(
    b: GraphBuilder,
    qkv: list[fx.Node],
    config: AttentionConfig,
    spelled: bool,
    given: dict[str, fx.Node],
    seq: Any,
) -> fx.Node:
    """Append attention over [batch, seq, heads * head_dim] values.

    Args:
        b: Where to.
        qkv: Query, key and value, projected.
        config: Sizes and form.
        spelled: Norms are written out.
        given: The model's inputs by name.
        seq: Length of the sequence.
    """
    batch, size = b.sizes["batch"], config.head_dim
    counts = (config.heads, config.kv_heads, config.kv_heads)
    split = []
    for value, count in zip(qkv, counts, strict=True):
        viewed = b(aten.view.default, value, [batch, seq, count, size])
        split.append(b(aten.transpose.int, viewed, 1, 2))
    q, k, v = split
    kind = "rms" if config.qk_norm else "none"
    q, k = norm(b, q, "q_norm", kind, size, spelled), norm(b, k, "k_norm", kind, size, spelled)
    if config.rope != "none":
        cos, sin = angles(b, config, seq)
        q, k = rotate(b, q, cos, sin, config), rotate(b, k, cos, sin, config)
    if config.group > 1 and (config.by_hand or config.form != "sdpa"):
        k, v = (repeat(b, value, config, seq) for value in (k, v))
    hidden = allowed(b, config, given, seq)
    attend = {"sdpa": sdpa, "spelled": softmax, "hard": clamped}[config.form]
    y = attend(b, q, k, v, config, hidden, given)
    turned = b(aten.transpose.int, y, 1, 2)
    return b(aten.reshape.default, turned, [batch, seq, config.heads * size])


def angles(b: GraphBuilder, config: AttentionConfig, seq: Any) -> tuple[fx.Node, fx.Node]:
    """Append cosine and sine of the angle by position and pair."""
    places = b(
        aten.arange.default, seq, dtype=b.dtype, device=torch.device("cpu"), pin_memory=False
    )
    table = b.weight("inv_freq", config.rotated, buffer=True)
    angle = b(aten.mul.Tensor, b(aten.unsqueeze.default, places, 1), table)
    return b(aten.cos.default, angle), b(aten.sin.default, angle)


def rotate(
    b: GraphBuilder, x: fx.Node, cos: fx.Node, sin: fx.Node, config: AttentionConfig
) -> fx.Node:
    """Append rotary embedding."""
    size, mul = 2 * config.rotated, aten.mul.Tensor
    rest, turned = None, x
    if size < config.head_dim:
        rest = b(aten.slice.Tensor, x, 3, size, END)
        turned = b(aten.slice.Tensor, x, 3, 0, size)
    if config.rope == "interleaved":
        even = b(aten.slice.Tensor, turned, 3, 0, END, 2)
        odd = b(aten.slice.Tensor, turned, 3, 1, END, 2)
        real = b(aten.sub.Tensor, b(mul, even, cos), b(mul, odd, sin))
        imaginary = b(aten.add.Tensor, b(mul, even, sin), b(mul, odd, cos))
        stacked = b(aten.stack.default, [real, imaginary], -1)
        turned = b(aten.flatten.using_ints, stacked, -2)
    else:
        first, second = b.several(2, aten.chunk.default, turned, 2, -1)
        wide_cos = b(aten.cat.default, [cos, cos], -1)
        wide_sin = b(aten.cat.default, [sin, sin], -1)
        straight = b(mul, turned, wide_cos)
        crossed = b(aten.cat.default, [b(aten.neg.default, second), first], -1)
        turned = b(aten.add.Tensor, straight, b(mul, crossed, wide_sin))
    return turned if rest is None else b(aten.cat.default, [turned, rest], -1)


def repeat(b: GraphBuilder, x: fx.Node, config: AttentionConfig, seq: Any) -> fx.Node:
    """Append copies of key or value heads."""
    batch, size = b.sizes["batch"], config.head_dim
    wide = [batch, config.kv_heads, config.group, seq, size]
    expanded = b(aten.expand.default, b(aten.unsqueeze.default, x, 2), wide)
    return b(aten.reshape.default, expanded, [batch, config.heads, seq, size])


def allowed(
    b: GraphBuilder, config: AttentionConfig, given: dict[str, fx.Node], seq: Any
) -> fx.Node | None:
    """Append the mask of keys a query may see."""
    if config.mask == "padding":
        rows = b(aten.unsqueeze.default, given["mask"], 1)
        return b(aten.unsqueeze.default, rows, 2)
    if config.mask == "causal" and config.form != "sdpa":
        options = {"dtype": torch.bool, "device": torch.device("cpu"), "pin_memory": False}
        return b(aten.tril.default, b(aten.ones.default, [seq, seq], **options))
    return None


def sdpa(
    b: GraphBuilder,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    config: AttentionConfig,
    keys: fx.Node | None,
    given: dict[str, fx.Node],
) -> fx.Node:
    """Append attention as one op."""
    op = aten.scaled_dot_product_attention.default
    grouped = {"enable_gqa": True} if config.group > 1 and not config.by_hand else {}
    if config.mask == "causal":
        return b(op, q, k, v, None, 0.0, True, **grouped)
    mask = given["bias"] if config.mask == "additive" else keys
    return b(op, q, k, v, *(() if mask is None else (mask,)), **grouped)


def softmax(
    b: GraphBuilder,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    config: AttentionConfig,
    keys: fx.Node | None,
    given: dict[str, fx.Node],
) -> fx.Node:
    """Append attention as a softmax between two products."""
    scores = b(aten.matmul.default, q, b(aten.transpose.int, k, -2, -1))
    scores = b(aten.mul.Tensor, scores, config.head_dim**-0.5)
    scores = masked(b, scores, config, keys, given, float("-inf"))
    return b(aten.matmul.default, b(aten.softmax.int, scores, -1), v)


def clamped(
    b: GraphBuilder,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    config: AttentionConfig,
    keys: fx.Node | None,
    given: dict[str, fx.Node],
) -> fx.Node:
    """Append attention by clamped scores."""
    scores = b(aten.matmul.default, q, b(aten.transpose.int, k, -2, -1))
    scores = b(aten.clamp.default, scores, -2.0, 2.0)
    return b(aten.matmul.default, masked(b, scores, config, keys, given, 0.0), v)


def masked(
    b: GraphBuilder,
    scores: fx.Node,
    config: AttentionConfig,
    keys: fx.Node | None,
    given: dict[str, fx.Node],
    value: float,
) -> fx.Node:
    """Append a mask of scores."""
    if keys is not None:
        hidden = b(aten.bitwise_not.default, keys)
        scores = b(aten.masked_fill.Scalar, scores, hidden, value)
    if config.mask == "additive":
        scores = b(aten.add.Tensor, scores, given["bias"])
    return scores
