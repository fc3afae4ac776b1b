"""Activations of feed-forward networks: value and derivative, by the names recognition gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.activations import FUNCTIONS, QUICK

Gradient = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        value: Its value.
        gradient: Gradient of its input, from the gradient of its value and its input.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Gradient


def _gelu_tanh(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(grad, x, approximate="tanh")


_GRADIENTS: Mapping[str, Gradient] = {
    "gelu": aten.gelu_backward,
    "gelu_tanh": _gelu_tanh,
    "none": lambda grad, x: grad,
    "quick_gelu": lambda grad, x: aten.silu_backward(grad, QUICK * x),
    "relu": lambda grad, x: grad * (x > 0),
    "relu2": lambda grad, x: grad * 2 * F.relu(x),
    "sigmoid": lambda grad, x: aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "silu": aten.silu_backward,
    "tanh": lambda grad, x: aten.tanh_backward(grad, torch.tanh(x)),
}

ACTIVATIONS: Final[Mapping[str, Activation]] = {
    name: Activation(value, _GRADIENTS[name]) for name, value in FUNCTIONS.items()
}
"""By name; what an op takes for its `activation`."""
