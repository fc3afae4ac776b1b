"""`blockwright::moe_ffn`: feed-forward experts, of which every token visits a few.

    y = sum over i < k of  weight[i] * expert[index[i]](x)             experts: `kernels/experts.py`

The router that makes `index` and `weight`, and an expert that every token visits, are ordinary
layers around the op. Its cost grows with k, which may be a dynamic size, not with the experts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ...kernels.experts import Experts
from ..errors import OptionError
from .activations import ACTIVATIONS
from .experts import route, route_backward

_FUSED: Final = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("blockwright::moe_ffn", mutates_args=())
def moe_ffn(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Send every token to its experts and add up what they return.

    Args:
        x: [*tokens, dim], floating point.
        index: int64 [*tokens, k], the experts of each token, within 0..experts-1 and no expert
            twice. k may be 0.
        weight: [*tokens, k], what each answer is multiplied by.
        gate: [experts, ffn_dim, dim]; None when experts are plain.
        up: [experts, ffn_dim, dim].
        up_bias: [experts, ffn_dim] or None.
        gate_bias: [experts, ffn_dim] or None.
        down: [experts, dim, ffn_dim].
        down_bias: [experts, dim] or None.
        activation: A key of `ACTIVATIONS`.

    Returns:
        [*tokens, dim], of the type of `x`; summed in fp32, or in fp64 for fp64.
    """
    experts = Experts(gate, up, up_bias, gate_bias, down, down_bias, activation)
    return route(experts, _rows(x), _rows(index), _rows(weight)).reshape(x.shape)


@moe_ffn.register_fake
def _(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise OptionError(
            f"moe_ffn: activation={activation!r} is unknown.",
            remedy=f"use one of {', '.join(ACTIVATIONS)}.",
        )
    return x.new_empty(x.shape)


@moe_ffn.register_kernel("cuda")
def _(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    experts = Experts(gate, up, up_bias, gate_bias, down, down_bias, activation)
    alike = all(t is None or t.dtype == x.dtype for t in experts.tensors)
    if not (alike and x.dtype in _FUSED and importlib.util.find_spec("triton")):
        return route(experts, _rows(x), _rows(index), _rows(weight)).reshape(x.shape)
    from ...kernels import moe_triton

    return moe_triton.moe_ffn(x, index, weight, experts)


@torch.library.custom_op("blockwright::moe_ffn_backward", mutates_args=())
def moe_ffn_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Return the gradients of all floating-point arguments of the op that are there."""
    experts = Experts(gate, up, up_bias, gate_bias, down, down_bias, activation)
    rows = (_rows(t) for t in (grad, x, index, weight))
    grad_x, grad_weight, *others = route_backward(experts, *rows)
    return [grad_x.reshape(x.shape), grad_weight.reshape(weight.shape), *others]


@moe_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> list[Tensor]:
    given = (x, weight, gate, up, up_bias, gate_bias, down, down_bias)
    return [t.new_empty(t.shape) for t in given if t is not None]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.blockwright.moe_ffn_backward(grad, *tensors, ctx.activation))
    integer = 1  # the place of `index`
    gradients = [
        None if tensor is None or place == integer else next(found)
        for place, tensor in enumerate(tensors)
    ]
    return (*gradients, None)


moe_ffn.register_autograd(_backward, setup_context=_remember)


def flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> dict[str, int]:
    """Two FLOPs per multiply-add of the k experts of every token, and what is done per element."""
    matrices = _matrices(shapes)
    visits, (_, ffn_dim, dim) = math.prod(shapes[1]), matrices[0]
    return {
        "linear": 2 * visits * ffn_dim * dim * len(matrices),
        "elementwise": visits * ((len(matrices) - 1) * ffn_dim + 2 * dim),
    }


def weights(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Weights are parameters."""
    return 0


def idle(shapes: list[tuple[int, ...]]) -> int:
    """Count the weights of the experts that a token does not visit."""
    stored, experts, k = shapes[3:], _matrices(shapes)[0][0], shapes[1][-1]
    return sum(math.prod(shape) for shape in stored) * max(experts - k, 0) // experts


def describe(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Say how many experts there are, how wide, and how many a token visits."""
    experts, ffn_dim, _ = arguments["up"].shape
    return "FFN", f"{experts} experts x {ffn_dim}, top-{arguments['index'].shape[-1]}"


def _matrices(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the shapes of gate, if there is one, up and down."""
    return [shape for shape in shapes[3:] if len(shape) == 3]


def _rows(x: Tensor) -> Tensor:
    """Give a tensor one leading axis; its last one may be empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


OP = torch.ops.blockwright.moe_ffn.default
