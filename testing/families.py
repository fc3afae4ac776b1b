"""One small model of each family, for what must hold across architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.capture import capture
from ..ir.program import Program
from ..models import bert, dit, flux, gpt, llama, swin, vit
from .build_module import to_module
from .configs import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    InputSpec,
    ModelConfig,
    WeightSpec,
)
from .values import inputs_of


@dataclass(frozen=True, eq=False)
class Family:
    """A captured model and inputs for it.

    Attributes:
        name: As in `FAMILIES`.
        program: The model.
        inputs: Flat inputs of the program.
    """

    name: str
    program: Program
    inputs: list[Tensor]


BLOCK = BlockConfig(
    AttentionConfig(kv_heads=2, group=2, form="spelled", mask="causal", by_hand=True),
    FeedForwardConfig(hidden=12, activation="silu", gated=True),
    norm="rms",
    spelled=True,
)
SPELLED = ModelConfig(
    family="decoder",
    dim=8,
    vocab=16,
    blocks=(BLOCK, BLOCK),
    final_norm="rms",
    head="linear",
    seq=4,
    weights=WeightSpec(kind="gauss"),
)
"""A decoder that writes out norms, activations and attention in elementary ops."""


class Spelled(nn.Module):
    """`SPELLED` as a module that offers its inputs, as the models of `models/` do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = to_module(SPELLED)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a valid batch of sequences."""
        return tuple(inputs_of(SPELLED, InputSpec(kind="gauss")).values())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: gpt.GPT(replace(gpt.TOY, depth=2)),
    "llama": lambda: llama.Llama(replace(llama.TOY, depth=2)),
    "bert": lambda: bert.Bert(replace(bert.TOY, depth=2)),
    "vit": lambda: vit.ViT(replace(vit.TOY, depth=2)),
    "dit": lambda: dit.DiT(replace(dit.TOY, depth=2)),
    "flux": lambda: flux.Flux(replace(flux.TOY_FLUX, double_depth=1, single_depth=1)),
    "swin": lambda: swin.Swin(replace(swin.TOY, depths=(1, 2))),
    "spelled": Spelled,
}


@cache
def family(name: str) -> Family:
    """Return the model of a family; weights are drawn from seed 0, none of them zero."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: Any = FAMILIES[name]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    inputs = model.example_inputs()
    program = capture(model, inputs)
    return Family(name, program, list(program.arranged(program.signature.bind(inputs, {}))))
