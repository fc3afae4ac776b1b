"""Dense feed-forward networks as sets of hidden neurons that can be taken apart.

Neuron j is row j of `up` (and of `gate`, and number j of their biases) and column j of `down`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ir.graphs import aten
from ...ir.ops.activations import ACTIVATIONS
from ...ir.recognize import Experts, FeedForward, Layer
from ...ir.recognize.flow import flow_of

PARTS = ("gate", "gate_bias", "up", "up_bias", "down", "down_bias")


@dataclass(frozen=True)
class Neurons:
    """Hidden neurons of a feed-forward network, and the bias behind them.

    Attributes:
        up: [ffn_dim, dim].
        down: [dim, ffn_dim].
        activation: A key of `ir.ops.activations.ACTIVATIONS`.
        gate: [ffn_dim, dim], or None in a plain network.
        up_bias: [ffn_dim], or None.
        gate_bias: [ffn_dim], or None.
        down_bias: [dim], or None; belongs to no neuron.
    """

    up: Tensor
    down: Tensor
    activation: str
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def of(cls, ffn: FeedForward) -> Self:
        """Return the neurons of a network; ask `cannot_split` first."""
        gate = ffn.gate_layer
        return cls(
            ffn.up, ffn.down, ffn.activation, ffn.gate, ffn.up_layer.bias,
            gate.bias if gate else None, ffn.down_layer.bias,
        )  # fmt: skip

    @property
    def keys(self) -> Tensor:
        """[ffn_dim, dim]: what a neuron compares its input with."""
        return self.up if self.gate is None else self.gate

    def take(self, chosen: Sequence[int]) -> Self:
        """Return some neurons, in the given order, with the whole bias behind them."""
        index = torch.tensor(chosen, dtype=torch.int64, device=self.up.device)
        rows = {n: t[index] for n in PARTS[:4] if (t := getattr(self, n)) is not None}
        return self.with_(**rows, down=self.down[:, index].contiguous())

    def with_(self, **parts: Tensor | None) -> Self:
        """Return the same with other tensors."""
        return type(self)(**{**vars(self), **parts})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors there are by name."""
        return {name: t for name in PARTS if (t := getattr(self, name)) is not None}

    def __call__(self, x: Tensor) -> Tensor:
        """Map [*batch, dim] to [*batch, dim]."""
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what the neurons answer, [*batch, ffn_dim]."""
        act = ACTIVATIONS[self.activation].value
        if self.gate is None:
            return act(F.linear(x, self.up, self.up_bias))
        return act(F.linear(x, self.gate, self.gate_bias)) * F.linear(x, self.up, self.up_bias)


class Network(nn.Module):
    """A dense feed-forward network of given neurons."""

    def __init__(self, neurons: Neurons) -> None:
        super().__init__()
        self.activation = neurons.activation
        held = neurons.tensors()
        for name in PARTS:
            self.register_parameter(name, as_parameter(held.get(name)))

    def forward(self, x: Tensor) -> Tensor:
        parts = {name: getattr(self, name) for name in PARTS}
        return Neurons(activation=self.activation, **parts)(x)


class Beside(nn.Module):
    """A network in the place of one whose first layer also computes other values.

    Args:
        network: What gives the first value.
        others: Weight and bias of the share of the layer that each further value is.
    """

    def __init__(self, network: nn.Module, others: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.network = network
        self.weights = nn.ParameterList(as_parameter(weight) for weight, _ in others)
        self.biased = tuple(bias is not None for _, bias in others)
        self.biases = nn.ParameterList(as_parameter(b) for _, b in others if b is not None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        biases = iter(self.biases)
        shares = [
            F.linear(x, weight, next(biases) if biased else None)
            for weight, biased in zip(self.weights, self.biased, strict=True)
        ]
        return self.network(x), *shares


def beside(region: FeedForward | Experts, network: nn.Module) -> nn.Module:
    """Return a network that also gives what else the region gives; ask `cannot_split` first."""
    others = [layer for layer in _others(region) if layer is not None]
    found = [layer.bind(region.program, region.graph, region.instance) for layer in others]
    return Beside(network, [(f.weight, f.bias) for f in found]) if found else network


def cannot_split(ffn: FeedForward) -> str | None:
    """Say why the neurons of a network cannot be taken apart, or None.

    Returns:
        A reason that completes the sentence "the network ...".
    """
    layers = ffn.layers
    linear = all(layer.node.target is aten.linear.default for layer in layers)
    reasons: Mapping[str, bool] = {
        "shares its last matrix with an attention; canonicalize cuts it in two": ffn.shares_down,
        "has layers that are no dense linear ones; canonicalize or leave it out": (
            not linear or not ffn.is_dense
        ),
        "has convolutions among its neurons": bool(ffn.depthwise),
        "mixes tokens, not channels": ffn.axis != "channels",
        f"has the activation {ffn.activation}, which experts do not have": (
            ffn.activation not in ACTIVATIONS
        ),
        "reads something beside its input": ffn.inputs != (ffn.x,),
        "gives a part of its last matrix only": ffn.down_layer.is_fused,
        "shares a weight with another place": _is_tied(ffn),
    }
    for reason, applies in reasons.items():
        if applies:
            return reason
    if len({layer.weight.dtype for layer in layers}) > 1:
        return "mixes weight types"
    if any(layer is None for layer in _others(ffn)):
        return f"gives {ffn.outputs[1].name} as well, which is no part of its first layer"
    return None


def _is_tied(ffn: FeedForward) -> bool:
    slots = {slot for layer in ffn.layers for slot in (layer.weight_node, layer.bias_node) if slot}
    return any(ffn.is_shared(slot) for slot in slots)


def _others(region: FeedForward | Experts) -> list[Layer | None]:
    """Return the shares of a first layer that the region gives beside its result."""
    flow = flow_of(region.y.graph)
    found = [Layer.behind(flow, value, untouched=True) for value in region.outputs[1:]]
    firsts = [layer if layer and layer.inputs[0] is region.x else None for layer in found]
    return [layer if layer and layer.is_dense else None for layer in firsts]


def as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """Return a parameter that is not trained by itself."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
