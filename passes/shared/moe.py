"""Feed-forward networks in experts: how neurons are dealt out, and the module that routes.

    y = shared(x) + sum over i in top-k of  g_i(x) * expert[i](x)        g = score(router(x))

The bias behind the neurons is added once, whatever k is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ir.errors import OptionError
from .neurons import PARTS, Network, Neurons, as_parameter

SCORES = ("softmax", "sigmoid", "unit")


@dataclass(frozen=True)
class Gating:
    """What a router makes of its logits.

    Attributes:
        active: Experts a token visits.
        score: `softmax` over all experts, `sigmoid` of each, or `unit`: gates of one.
        renormalise: Whether gates are divided by their sum.
        scale: What gates are multiplied with.
    """

    active: int
    score: str = "unit"
    renormalise: bool = False
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts chosen and their gates, [*batch, active] each."""
        scores = logits
        if self.score == "softmax":
            scores = logits.softmax(dim=-1)
        elif self.score == "sigmoid":
            scores = logits.sigmoid()
        gates, index = torch.topk(scores, self.active, dim=-1)
        if self.score == "unit":
            gates = torch.ones_like(gates)
        if self.renormalise:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return index, gates if self.scale == 1 else gates * self.scale


@dataclass(frozen=True)
class Split:
    """How the neurons of a network are dealt out.

    Attributes:
        shared: Neurons of the expert that every token visits.
        experts: Neurons of each of the others, as many each.
        active: Experts a token visits; with 0 the others are dropped.
        unused: Experts that no token of the calibration chose.
        errors: (active, error of the network relative to the dense one) on calibration, its router
            as it begins, with gates of one.
    """

    shared: list[int]
    experts: list[list[int]]
    active: int
    unused: int = 0
    errors: list[tuple[int, float]] | None = None

    @property
    def order(self) -> list[int]:
        """All neurons: the shared ones, then expert by expert."""
        return [*self.shared, *chain.from_iterable(self.experts)]


class MoEFeedForward(nn.Module):
    """Experts with a router, beside what every token visits.

    Args:
        shared: Neurons of the shared expert, with the bias behind all neurons.
        experts: Neurons of the others.
        router: [experts, dim], a parameter, or a buffer if it is made of other weights.
        gating: What is made of the router's logits.
    """

    def __init__(
        self, shared: Neurons, experts: Sequence[Neurons], router: Tensor, gating: Gating
    ) -> None:
        super().__init__()
        self.gating, self.activation = gating, shared.activation
        self.shared = Network(shared) if len(shared.up) else None
        self.bias = None if self.shared else as_parameter(shared.down_bias)
        if isinstance(router, nn.Parameter):
            self.router = router
        else:
            self.register_buffer("router", router)
        parts = stacked(experts)
        for name in PARTS[:-1]:
            self.register_parameter(name, as_parameter(parts.get(name)))

    def forward(self, x: Tensor) -> Tensor:
        index, gates = self.gating(F.linear(x, self.router))
        parts = {name: getattr(self, name) for name in PARTS[:-1]}
        routed = visit(x, index, gates, parts, self.activation)
        if self.shared is not None:
            return self.shared(x) + routed
        return routed if self.bias is None else routed + self.bias


def routed(neurons: Neurons, split: Split, gating: Gating, *, train_router: bool) -> nn.Module:
    """Return what stands in the place of a dense network.

    Routers begin at the mean key of their expert's neurons.

    Raises:
        OptionError: The split does not hold every neuron once, or experts differ in size.
    """
    check(split, len(neurons.up))
    shared = neurons.take(split.shared)
    if not split.active:
        return Network(shared)
    experts = [neurons.take(part) for part in split.experts]
    router = mean_keys(experts)
    return MoEFeedForward(
        shared, experts, nn.Parameter(router, requires_grad=False) if train_router else router,
        gating,
    )  # fmt: skip


def stacked(experts: Sequence[Neurons]) -> dict[str, Tensor]:
    """Return the experts' weights by name, experts along the first axis."""
    names = [name for name in experts[0].tensors() if name != "down_bias"]
    return {name: torch.stack([getattr(expert, name) for expert in experts]) for name in names}


def visit(
    x: Tensor, index: Tensor, gates: Tensor, parts: Mapping[str, Tensor | None], activation: str
) -> Tensor:
    """Return what the chosen experts say, their weights given by name."""
    names = ("gate", "up", "up_bias", "gate_bias", "down", "down_bias")
    weights = [parts.get(name) for name in names]
    y: Tensor = torch.ops.blockwright.moe_ffn(x, index, gates, *weights, activation)
    return y


def mean_keys(experts: Sequence[Neurons]) -> Tensor:
    """Return the mean key of each expert's neurons, [experts, dim]."""
    return torch.stack([expert.keys.mean(dim=0) for expert in experts])


def check(split: Split, ffn_dim: int) -> None:
    """Refuse a split that is none of a network of this many neurons.

    Raises:
        OptionError: A neuron is missing or there twice, experts differ in size or are too few.
    """
    sizes = {len(part) for part in split.experts}
    fits = sorted(split.order) == list(range(ffn_dim)) and len(sizes) <= 1
    if not fits or not 0 <= split.active <= len(split.experts):
        raise OptionError(
            f"this split of {ffn_dim} neurons in {len(split.experts)} experts, {split.active} of"
            " them active, does not hold every neuron once in experts of one size.",
            remedy="edit `shared` and `experts` of the plan so that they do.",
        )
