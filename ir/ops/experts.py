"""The meaning of routing through experts, forwards and backwards: one expert after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...kernels.experts import Experts
from .activations import ACTIVATIONS


def route(
    experts: Experts,
    x: Float[Tensor, "rows dim"],
    index: Int[Tensor, "rows k"],
    weight: Float[Tensor, "rows k"],
) -> Float[Tensor, "rows dim"]:
    """Add up what the experts of each row return."""
    y = x.new_zeros(x.shape, dtype=_sum_type(x))
    for expert, row, choice in _visits(index, len(experts.up)):
        answer = experts.one(expert).answer(x[row]).to(y.dtype)
        y.index_add_(0, row, answer * weight[row, choice, None].to(y.dtype))
    return y.to(x.dtype)


def route_backward(
    experts: Experts,
    grad: Float[Tensor, "rows dim"],
    x: Float[Tensor, "rows dim"],
    index: Int[Tensor, "rows k"],
    weight: Float[Tensor, "rows k"],
) -> list[Tensor]:
    """Return the gradients of x and weight, and of those tensors of the experts that are there."""
    total = [None if t is None else torch.zeros_like(t) for t in experts.tensors]
    grad_x = x.new_zeros(x.shape, dtype=_sum_type(x))
    grad_weight = torch.zeros_like(weight)
    for expert, row, choice in _visits(index, len(experts.up)):
        one, share = experts.one(expert), weight[row, choice, None].to(x.dtype)
        grad_weight[row, choice] = (one.answer(x[row]) * grad[row]).sum(-1).to(weight.dtype)
        rows, own = answer_backward(one, grad[row] * share, x[row])
        grad_x.index_add_(0, row, rows.to(grad_x.dtype))
        for whole, part in zip(total, own, strict=True):
            if whole is not None:
                whole[expert] = part
    return [grad_x.to(x.dtype), grad_weight, *(t for t in total if t is not None)]


def answer_backward(
    expert: Experts, grad: Float[Tensor, "rows dim"], x: Float[Tensor, "rows dim"]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of the rows, and those of one expert's tensors in their order.

    Gradients of tensors that are not there stand in the list as well, and mean nothing.
    """
    act, (pre, value, hidden) = ACTIVATIONS[expert.activation], expert.hidden(x)
    grad_hidden = grad @ expert.down
    if expert.gate is None:
        grad_pre = grad_value = act.gradient(grad_hidden, pre)
        grad_x = grad_value @ expert.up
    else:
        grad_pre = act.gradient(grad_hidden * value, pre)
        grad_value = grad_hidden * act.value(pre)
        grad_x = grad_value @ expert.up + grad_pre @ expert.gate
    matrices = (grad_pre.t() @ x, grad_value.t() @ x, grad.t() @ hidden)
    biases = (grad_value.sum(0), grad_pre.sum(0), grad.sum(0))
    return grad_x, [*matrices[:2], *biases[:2], matrices[2], biases[2]]


def _visits(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that is used, its rows, and which of their k choices it is."""
    for expert in range(experts):
        row, choice = torch.where(index == expert)
        if len(row):
            yield expert, row, choice


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
