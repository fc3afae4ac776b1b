"""Activations of feed-forward networks, by the names that recognition gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK: Final = 1.702
"""quick_gelu(x) = x * sigmoid(1.702 x)"""


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def none(x: Tensor) -> Tensor:
    """Return the input: the gate of a bilinear unit."""
    return x


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid."""
    return x * torch.sigmoid(QUICK * x)


def relu2(x: Tensor) -> Tensor:
    """ReLU squared."""
    return F.relu(x).square()


FUNCTIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "none": none,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}
