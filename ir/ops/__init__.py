"""Structural ops: what ATen has no word for, one file each.

A file defines the op with `torch.library.custom_op` in the namespace `blockwright`: the reference
is the meaning, the fake gives shapes, and `OPS` below says what it costs. Importing this package
registers them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import (
    block_attention,
    block_product,
    block_tables,
    block_values,
    dequantize,
    hash_linear,
    int8_linear,
    moe_ffn,
    quantized_embedding,
    quantized_linear,
)

Shape = tuple[int, ...]
Shapes = list[Shape]


@dataclass(frozen=True)
class StructuralOp:
    """What the framework knows of an op beside its meaning.

    Attributes:
        overload: The `torch.ops.blockwright.*.default` overload.
        flops: FLOPs of one call by itemised kind, from concrete shapes of its tensor arguments
            and its output, the first of several, and from `sizes`.
        weights: Weights a call stands for, which are no parameters of their own once they are
            stored as codes; from the same shapes.
        backends: Backends that lower it.
        describe: Says what part of a model a call is and of which kind, from its arguments by
            name, tensors as the graph records them: `("linear layers", "int8 weights")`,
            `("FFN", "8 experts x 192, top-2")`. Diffs compare the kinds of one part.
        values: How many of its tensor arguments are computed; they come first, weights follow.
        idle: Weights of a call that one token is not multiplied with, from the shapes of its
            tensor arguments; None when it is multiplied with all of them.
        sizes: Names of number arguments that `flops` is given besides.
    """

    overload: Any
    flops: Callable[..., Mapping[str, int]]
    weights: Callable[[Shapes, Shape], int]
    backends: frozenset[str]
    describe: Callable[[Mapping[str, Any]], tuple[str, str]]
    values: int = 1
    idle: Callable[[Shapes], int] | None = None
    sizes: tuple[str, ...] = ()


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
            dequantize.OP,
            dequantize.flops,
            dequantize.weights,
            EVERYWHERE,
            dequantize.describe,
            values=0,
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
        StructuralOp(
            block_attention.OP,
            block_attention.flops,
            block_attention.weights,
            EVERYWHERE,
            block_attention.describe,
            values=4,
            sizes=("key_block",),
        ),
        StructuralOp(
            hash_linear.OP,
            hash_linear.flops,
            hash_linear.weights,
            EVERYWHERE,
            hash_linear.describe,
            idle=hash_linear.idle,
        ),
        StructuralOp(
            block_values.ROUND,
            block_values.elementwise,
            block_values.no_weights,
            EVERYWHERE,
            block_values.describe_round,
        ),
        StructuralOp(
            block_values.WEIGHT,
            block_values.elementwise,
            block_values.weight_size,
            EVERYWHERE,
            block_values.describe_weight,
        ),
        StructuralOp(
            block_values.EMBEDDING,
            block_values.elementwise,
            block_values.table_size,
            EVERYWHERE,
            block_values.describe_embedding,
        ),
        StructuralOp(
            block_product.LINEAR,
            block_product.linear_flops,
            block_product.weights,
            EVERYWHERE,
            block_product.describe_linear,
        ),
        StructuralOp(
            block_product.MATMUL,
            block_product.matmul_flops,
            block_values.no_weights,
            EVERYWHERE,
            block_product.describe_matmul,
            values=2,
        ),
        StructuralOp(
            block_tables.ACTIVATION,
            block_values.elementwise,
            block_values.no_weights,
            EVERYWHERE,
            block_tables.describe_activation,
        ),
        StructuralOp(
            block_tables.SOFTMAX,
            block_values.elementwise,
            block_values.no_weights,
            EVERYWHERE,
            block_tables.describe_softmax,
        ),
    )
}
