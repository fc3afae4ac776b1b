"""`blockwright::hash_linear`: a layer that looks rows up instead of multiplying by a weight.

    y = sum over tables k of  score_k * table[k, code_k] + bias        hash: `kernels/hashing.py`

Where several layers read one value, their tables stand side by side in one call: the value is
hashed once, and one wide row is read instead of several.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ...kernels.hashing import SCORES, hashed, score_gradient
from ..errors import OptionError

_FUSED: Final = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("blockwright::hash_linear", mutates_args=())
def hash_linear(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    """Add up the rows that the chunks of a vector address, each times its score.

    Args:
        x: [*batch, in_features], floating point.
        tables: [in_features / bits, 2 ** bits, out_features].
        bias: [out_features] or None.
        score: `l1_softmax` or `softmax`.

    Returns:
        [*batch, out_features], of the type of `x`; summed in fp32, or in fp64 for fp64.
    """
    return look_up(x, tables, bias, score)


def look_up(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    """Do what the op does, table by table."""
    code, weight = hashed(_rows(x), bits_of(tables.shape), score)
    y = weight.new_zeros(len(code), tables.shape[-1])
    for index, table in enumerate(tables):
        y += weight[:, index, None] * table[code[:, index]]
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], tables.shape[-1])


@hash_linear.register_fake
def _(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    if score not in SCORES:
        raise OptionError(
            f"hash_linear: score={score!r} is unknown.", remedy=f"use one of {', '.join(SCORES)}."
        )
    bits, (count, rows, features) = bits_of(tables.shape), tables.shape
    if rows != 2**bits or count * bits != x.shape[-1]:
        raise OptionError(
            f"hash_linear: {count} tables of {rows} rows do not fit {x.shape[-1]} features.",
            remedy="use in_features / bits tables of 2 ** bits rows.",
        )
    return x.new_empty((*x.shape[:-1], features))


@hash_linear.register_kernel("cuda")
def _(x: Tensor, tables: Tensor, bias: Tensor | None, score: str) -> Tensor:
    if not (tables.dtype == x.dtype and x.dtype in _FUSED and importlib.util.find_spec("triton")):
        return look_up(x, tables, bias, score)
    from ...kernels import hash_triton

    return hash_triton.hash_linear(x, tables, bias, score)


@torch.library.custom_op("blockwright::hash_linear_backward", mutates_args=())
def hash_linear_backward(grad: Tensor, x: Tensor, tables: Tensor, score: str) -> list[Tensor]:
    """Return the gradients of x and the tables; rows that nobody addresses get zeros."""
    bits, rows, each = bits_of(tables.shape), _rows(x), _rows(grad)
    code, weight = hashed(rows, bits, score)
    of_weight, of_tables = torch.empty_like(weight), torch.zeros_like(tables)
    each = each.to(weight.dtype)
    for index, table in enumerate(tables):
        place = code[:, index]
        of_weight[:, index] = (table[place] * each).sum(dim=-1)
        share = (weight[:, index, None] * each).to(tables.dtype)
        of_tables[index].index_add_(0, place, share)
    return [score_gradient(of_weight, rows, bits, score).reshape(x.shape), of_tables]


@hash_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, tables: Tensor, score: str) -> list[Tensor]:
    return [x.new_empty(x.shape), tables.new_empty(tables.shape)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tables, bias, ctx.score = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, tables)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, tables = ctx.saved_tensors
    of_x, of_tables = torch.ops.blockwright.hash_linear_backward(grad, x, tables, ctx.score)
    of_bias = _rows(grad).sum(dim=0).to(tables.dtype) if ctx.biased else None
    return of_x, of_tables, of_bias, None


hash_linear.register_autograd(_backward, setup_context=_remember)


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two FLOPs per element of a row that is read, and three per element that is hashed."""
    tables = shapes[1][0]
    return {"linear": 2 * math.prod(output) * tables, "elementwise": 3 * math.prod(shapes[0])}


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Weights are parameters."""
    return 0


def idle(shapes: list[tuple[int, ...]]) -> int:
    """Count the rows that a token does not address: all but one of each table."""
    tables, rows, features = shapes[1]
    return tables * (rows - 1) * features


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how many tables there are, and how long."""
    tables, rows, _ = arguments["tables"].shape
    return "linear layers", f"{tables} hashed tables x {rows} rows"


def bits_of(shape: torch.Size) -> int:
    """Return the bits that address a row of tables of a shape, [tables, 2 ** bits, features]."""
    return int(shape[1]).bit_length() - 1


def _rows(x: Tensor) -> Tensor:
    """Give a tensor one leading axis."""
    return x.reshape(-1, x.shape[-1])


OP = torch.ops.blockwright.hash_linear.default
