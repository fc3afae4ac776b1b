"""A config as a Program, without `torch.export`: what capture must make of `to_module`.

Every line appends the op that a line of `build_module` becomes; the two are read side by side.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ir.program import Program
from . import build_layers as layers
from .build_heads import heads
from .configs import BlockConfig, ModelConfig
from .graph_builder import GraphBuilder
from .values import TEXT, input_shapes, weight

aten = torch.ops.aten


def to_program(config: ModelConfig) -> Program:
    """Return the model as a program, with the weights its config names."""
    dtype = getattr(torch, config.dtype)
    b = GraphBuilder(
        dtype,
        {"batch": config.batch, "seq": config.seq},
        config.dynamic,
        lambda name, shape: weight(name, shape, config.weights, dtype),
    )
    shapes = input_shapes(config, "batch", "seq")
    types = {"mask": torch.bool, "x": torch.int64 if config.vocab else dtype}
    wanted = {name: (types.get(name, dtype), shape) for name, shape in shapes.items()}
    given = dict(zip(wanted, b.inputs(wanted), strict=True))
    x, dim = given["x"], config.dim
    if config.vocab:
        with b.at("embed"):
            x = b(aten.embedding.default, b.weight("weight", config.vocab, dim), x)
    for index, part in enumerate(config.runs()):
        if index == len(config.blocks):
            b.share(f"blocks.{index}", f"blocks.{index - 1}")
        with b.at(f"blocks.{index}"):
            if config.family == "mmdit":
                x, given["text"] = joint_block(b, x, part, given, dim)
            else:
                x = block(b, x, part, given, dim)
    x = layers.norm(b, x, "norm", config.final_norm, dim)
    if config.head == "none":
        return b.finish(b(aten.mul.Tensor, x, 1))
    with b.at("head"):
        shape = (config.vocab or dim, dim)
        tied = config.head == "tied"
        head = b.tie("weight", "embed.weight") if tied else b.weight("weight", *shape)
        return b.finish(b(aten.linear.default, x, head))


def block(
    b: GraphBuilder, x: fx.Node, config: BlockConfig, given: dict[str, fx.Node], dim: int
) -> fx.Node:
    """Append a residual block."""

    def attend(h: fx.Node) -> fx.Node:
        assert config.attention is not None
        with b.at("attn"):
            qkv = layers.project(b, h, config.attention, dim)
            with b.at("heads"):
                y = heads(b, qkv, config.attention, config.spelled, given, b.sizes["seq"])
            return layers.output(b, y, "o", config.attention, dim)

    def feed(h: fx.Node) -> fx.Node:
        assert config.ffn is not None
        return layers.feed_forward(b, h, config.ffn, config, dim)

    if config.parallel and config.attention and config.ffn:
        h = layers.norm(b, x, "norm1", config.norm, dim, config.spelled)
        return b(aten.add.Tensor, b(aten.add.Tensor, x, attend(h)), feed(h))
    for number, branch in ((1, attend), (2, feed)):
        if (config.attention, config.ffn)[number - 1] is None:
            continue
        h, gate = x, None
        if config.place != "post":
            h = layers.norm(b, x, f"norm{number}", config.norm, dim, config.spelled)
        if "cond" in given:
            h, gate = layers.modulate(b, h, f"mod{number}", given["cond"], dim)
        y = branch(h)
        if config.place == "sandwich":
            y = layers.norm(b, y, f"after{number}", config.norm, dim, config.spelled)
        x = b(aten.add.Tensor, x, y if gate is None else b(aten.mul.Tensor, gate, y))
        if config.place == "post":
            x = layers.norm(b, x, f"norm{number}", config.norm, dim, config.spelled)
    return x


def joint_block(
    b: GraphBuilder, x: fx.Node, config: BlockConfig, given: dict[str, fx.Node], dim: int
) -> tuple[fx.Node, fx.Node]:
    """Append a block of two streams; return image and text."""
    streams = [x, given["text"]]

    def before(stream: fx.Node) -> tuple[fx.Node, fx.Node]:
        h = layers.norm(b, stream, "norm", config.norm, dim, config.spelled)
        return layers.modulate(b, h, "mod", given["cond"], dim)

    if config.attention is not None:
        parts, gates = [], []
        for index, stream in enumerate(streams):
            with b.at(f"project.{index}"):
                h, gate = before(stream)
                parts.append(layers.project(b, h, config.attention, dim))
                gates.append(gate)
        joined = [b(aten.cat.default, [text, image], 1) for image, text in zip(*parts, strict=True)]
        with b.at("heads"):
            y = heads(b, joined, config.attention, config.spelled, {}, b.sizes["seq"] + TEXT)
        for index, (start, end) in enumerate(((TEXT, layers.END), (0, TEXT))):
            own = b(aten.slice.Tensor, y, 1, start, end)
            own = layers.output(b, own, f"o.{index}", config.attention, dim)
            gated = b(aten.mul.Tensor, gates[index], own)
            streams[index] = b(aten.add.Tensor, streams[index], gated)
    if config.ffn is not None:
        for index, stream in enumerate(streams):
            with b.at(f"feed.{index}"):
                h, gate = before(stream)
                y = layers.feed_forward(b, h, config.ffn, config, dim)
                streams[index] = b(aten.add.Tensor, stream, b(aten.mul.Tensor, gate, y))
    return streams[0], streams[1]
