"""Layers of a program, as functions that append their ops: the other half of `build_module`."""

from __future__ import annotations

import math

import torch
from torch import fx

from .configs import AttentionConfig, BlockConfig, FeedForwardConfig
from .graph_builder import GraphBuilder

aten = torch.ops.aten
END = 2**63 - 1  # what a slice without an end says


def linear(
    b: GraphBuilder, x: fx.Node, name: str, outputs: int, inputs: int, bias: bool
) -> fx.Node:
    """Append a linear layer."""
    with b.at(name):
        weights = [b.weight("weight", outputs, inputs)]
        weights += [b.weight("bias", outputs)] if bias else []
        return b(aten.linear.default, x, *weights)


def addmm(b: GraphBuilder, x: fx.Node, name: str, outputs: int, inputs: int) -> fx.Node:
    """Append a linear layer as GPT-2 has it."""
    with b.at(name):
        weight, bias = b.weight("weight", inputs, outputs), b.weight("bias", outputs)
        flat = b(aten.reshape.default, x, [-1, inputs])
        y = b(aten.addmm.default, bias, flat, weight)
        return b(aten.view.default, y, [b.sizes["batch"], b.sizes["seq"], outputs])


def norm(
    b: GraphBuilder, x: fx.Node, name: str, kind: str, size: int, spelled: bool = False
) -> fx.Node:
    """Append a norm; `none` passes its input on."""
    if kind == "none":
        return x
    with b.at(name):
        weight = b.weight("weight", size)
        if kind == "layer":
            return b(
                aten.layer_norm.default, x, [size], weight, b.weight("bias", size), 1e-5, False
            )
        if not spelled:
            return b(aten.rms_norm.default, x, [size], weight, 1e-5)
        square = b(aten.pow.Tensor_Scalar, x, 2)
        mean = b(aten.mean.dim, square, [-1], True)
        scale = b(aten.rsqrt.default, b(aten.add.Tensor, mean, 1e-5))
        return b(aten.mul.Tensor, b(aten.mul.Tensor, x, scale), weight)


def feed_forward(
    b: GraphBuilder, x: fx.Node, config: FeedForwardConfig, block: BlockConfig, dim: int
) -> fx.Node:
    """Append a feed-forward network."""

    def layer(x: fx.Node, name: str, outputs: int, inputs: int) -> fx.Node:
        if block.transposed:
            return addmm(b, x, name, outputs, inputs)
        return linear(b, x, name, outputs, inputs, config.bias)

    with b.at("ffn"):
        if not config.gated:
            h = activation(b, layer(x, "up", config.hidden, dim), config.activation, block.spelled)
            return layer(h, "down", dim, config.hidden)
        gate = activation(b, layer(x, "gate", config.hidden, dim), config.activation, block.spelled)
        h = b(aten.mul.Tensor, gate, layer(x, "up", config.hidden, dim))
        return layer(h, "down", dim, config.hidden)


def activation(b: GraphBuilder, x: fx.Node, kind: str, spelled: bool) -> fx.Node:
    """Append an activation."""
    if kind == "identity":
        return x
    if kind == "square":
        return b(aten.mul.Tensor, x, x)
    if kind == "relu":
        return b(aten.relu.default, x)
    if kind == "silu":
        if spelled:
            return b(aten.mul.Tensor, x, b(aten.sigmoid.default, x))
        return b(aten.silu.default, x)
    if not spelled:
        options = {"approximate": "tanh"} if kind == "gelu_tanh" else {}
        return b(aten.gelu.default, x, **options)
    half = b(aten.mul.Tensor, x, 0.5)
    if kind == "gelu":
        inner = b(aten.erf.default, b(aten.div.Tensor, x, math.sqrt(2)))
    else:
        cube = b(aten.mul.Tensor, b(aten.pow.Tensor_Scalar, x, 3), 0.044715)
        scaled = b(aten.mul.Tensor, b(aten.add.Tensor, x, cube), math.sqrt(2 / math.pi))
        inner = b(aten.tanh.default, scaled)
    return b(aten.mul.Tensor, half, b(aten.add.Tensor, inner, 1))


def modulate(
    b: GraphBuilder, x: fx.Node, name: str, cond: fx.Node, dim: int
) -> tuple[fx.Node, fx.Node]:
    """Append scale and shift by a condition; return the gate of the branch too."""
    both = linear(b, b(aten.relu.default, cond), name, 3 * dim, dim, True)
    shift, scale, gate = b.several(3, aten.chunk.default, b(aten.unsqueeze.default, both, 1), 3, -1)
    scaled = b(aten.mul.Tensor, x, b(aten.add.Tensor, scale, 1))
    return b(aten.add.Tensor, scaled, shift), gate


def project(b: GraphBuilder, x: fx.Node, config: AttentionConfig, dim: int) -> list[fx.Node]:
    """Append the projections to query, key and value."""
    inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {"q": inner, "k": kv, "v": kv}
    return [linear(b, x, name, size, dim, config.bias) for name, size in sizes.items()]


def output(b: GraphBuilder, x: fx.Node, name: str, config: AttentionConfig, dim: int) -> fx.Node:
    """Append the output projection."""
    return linear(b, x, name, dim, config.heads * config.head_dim, config.bias)
