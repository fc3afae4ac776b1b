"""Convolutions by what they mix: pointwise ones are linear layers over channels.

conv(x, weight[out, in, 1, 1]) = linear over the channels of every position
conv(x, weight[channels, 1, k, k], groups=channels)   mixes positions, each channel on its own
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, fx

from ..regions import local_path
from .calls import LAYOUT, arguments, op
from .flow import Flow
from .layer import Layer
from .rows import Rows

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution with a stored kernel."""
    return op(node) in CONVOLUTIONS and arguments(node)["weight"].op == "get_attr"


def kernel(node: fx.Node) -> tuple[int, ...]:
    """Return the extent of a convolution's kernel."""
    return tuple(int(size) for size in _weight(node).shape[2:])


def is_pointwise(node: fx.Node) -> bool:
    """Whether a convolution is a linear layer over channels."""
    if not is_convolution(node) or set(kernel(node)) != {1}:
        return False
    given = arguments(node)
    return given.get("groups", 1) == 1 and set(_sequence(given.get("stride", 1))) == {1}


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution mixes positions and keeps channels apart."""
    return is_convolution(node) and arguments(node).get("groups", 1) == _weight(node).shape[0] > 1


def is_patchwise(node: fx.Node) -> bool:
    """Whether a convolution cuts its input into patches: its stride is its kernel."""
    if not is_convolution(node) or set(kernel(node)) == {1}:
        return False
    stride = _sequence(arguments(node).get("stride", 1))
    return (stride if len(stride) > 1 else stride * len(kernel(node))) == kernel(node)


def is_reduced(flow: Flow, value: fx.Node, source: fx.Node) -> bool:
    """Whether a value is `source` with fewer positions: after convolutions, pooling and norms."""
    while value is not source:
        norm = flow.norm_to.get(value)
        if norm is not None:
            (value,) = norm.inputs
        elif is_convolution(value) or op(value) in LAYOUT or "pool" in op(value):
            value = value.args[0]  # type: ignore[assignment]
        else:
            return False
    return True


class Pointwise(Layer):
    """A pointwise convolution, or its share of one, looked at as a linear layer."""

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        return super().weight.flatten(1)

    @classmethod
    def of_channels(cls, node: fx.Node, rows: Rows | None) -> Self:
        """Return the layer a pointwise convolution is; `rows` None stands for all channels."""
        given = arguments(node)
        channels = int(_weight(node).shape[0])
        return cls(
            path=local_path(node),
            nodes=(node,),
            inputs=(given["input"],),
            outputs=(node,),
            weight_node=given["weight"],
            bias_node=given.get("bias"),
            rows=rows or Rows.of(0, [(channels, 1)]),
            columns=None,
            in_features=int(_weight(node).shape[1]),
        )


def _weight(node: fx.Node) -> Tensor:
    weight: Tensor = arguments(node)["weight"].meta["val"]
    return weight


def _sequence(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
