"""Structural ops: what ATen has no word for, one file each.

A file defines the op with `torch.library.custom_op` in the namespace `blockwright`: the reference
is the meaning, the fake gives shapes, and `OPS` below says what it costs. Importing this package
registers them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import int8_linear, moe_ffn, quantized_embedding, quantized_linear

Shape = tuple[int, ...]
Shapes = list[Shape]


@dataclass(frozen=True)
class StructuralOp:
    """What the framework knows of an op beside its meaning.

    Attributes:
        overload: The `torch.ops.blockwright.*.default` overload.
        flops: FLOPs of one call by itemised kind, from concrete shapes of its tensor arguments
            and its output.
        weights: Weights a call stands for, which are no parameters of their own once they are
            stored as codes; from the same shapes.
        backends: Backends that lower it.
        describe: Says what part of a model a call is and of which kind, from its arguments by
            name, tensors as the graph records them: `("linear layers", "int8 weights")`,
            `("FFN", "8 experts x 192, top-2")`. Diffs compare the kinds of one part.
        values: How many of its tensor arguments are computed; they come first, weights follow.
        idle: Weights of a call that one token is not multiplied with, from the shapes of its
            tensor arguments; None when it is multiplied with all of them.
    """

    overload: Any
    flops: Callable[[Shapes, Shape], Mapping[str, int]]
    weights: Callable[[Shapes, Shape], int]
    backends: frozenset[str]
    describe: Callable[[Mapping[str, Any]], tuple[str, str]]
    values: int = 1
    idle: Callable[[Shapes], int] | None = None


EVERYWHERE = frozenset({"eager", "inductor", "onnxruntime"})

OPS: Mapping[str, StructuralOp] = {
    str(op.overload): op
    for op in (
        StructuralOp(
            quantized_linear.OP,
            quantized_linear.flops,
            quantized_linear.weights,
            EVERYWHERE,
            quantized_linear.describe,
        ),
        StructuralOp(
            int8_linear.OP,
            int8_linear.flops,
            int8_linear.weights,
            EVERYWHERE,
            int8_linear.describe,
        ),
        StructuralOp(
            quantized_embedding.OP,
            quantized_embedding.flops,
            quantized_embedding.weights,
            EVERYWHERE,
            quantized_embedding.describe,
        ),
        StructuralOp(
            moe_ffn.OP,
            moe_ffn.flops,
            moe_ffn.weights,
            EVERYWHERE,
            moe_ffn.describe,
            values=3,
            idle=moe_ffn.idle,
        ),
    )
}
