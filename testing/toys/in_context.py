"""AlgoFormers that learn to solve a regression from the examples in front of the question.

    x_1, y_1, x_2, y_2, ...        y_i = w . phi(x_i), with a new w in every sequence

At each x_i the model predicts y_i from the pairs before it. `phi` is the identity or a fixed random
network, which the model has to find besides.

Source: Garg et al., 2022, arXiv:2208.01066, section 2; Gao et al., 2025, arXiv:2402.13572.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...models import algoformer as algoformer_file
from ...models import gpt as gpt_file
from ...models.algoformer import AlgoFormer, AlgoFormerConfig
from . import training
from .cache import trained
from .toy import Inputs, Task

DIM = 3  # numbers in an x
PAIRS = 8
HELD = 512  # sequences of the error
LAST = 3  # turns of the loop that are supervised
CONFIG = AlgoFormerConfig(
    inputs=DIM, context=2 * PAIRS, dim=32, heads=4, ffn_dim=128, times=12, inject="prepared",
    window=6,
)  # fmt: skip
LOOPED = replace(CONFIG, pre=0, post=0, inject="embedded", from_zero=True)
STANDARD = replace(CONFIG, pre=3, loop=0, post=0, times=0, inject="nothing")
PLAN = training.Plan(steps=3000, batch=64, rate=1e-3, weight_decay=0.01)

Representation = Callable[[Tensor], Tensor]


def in_context(config: AlgoFormerConfig, *, represented: bool = False) -> AlgoFormer:
    """Return a model trained on the regressions, with or without a representation."""
    build, loss = partial(AlgoFormer, config), windowed(regressions(represented), PLAN.batch)
    return trained(
        "in-context",
        build,
        lambda: training.train(build, loss, PLAN, "in-context"),
        *(config, represented, PLAN, algoformer_file, gpt_file, training, sys.modules[__name__]),
    )


def regressions(represented: bool) -> Task:
    """Return the task of predicting every y from the pairs before it."""
    phi = random_network() if represented else nn.Identity()

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        x = torch.randn((count, PAIRS, DIM), generator=generator)
        with torch.no_grad():
            features = phi(x)
        weights = torch.randn((count, DIM, 1), generator=generator)
        y = features @ weights / DIM**0.5
        return (interleaved(x, y),), y[..., 0]

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (answers(outputs) - target).square().mean(dim=1)

    return Task(draw, loss)


def random_network() -> nn.Module:
    """Return the fixed representation: two layers and a leaky rectifier, features of variance 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(DIM, DIM), nn.LeakyReLU(0.2), nn.Linear(DIM, DIM)
        norm = nn.BatchNorm1d(DIM, affine=False, momentum=None)
        norm(nn.Sequential(*layers)(torch.randn(10_000, DIM)))
    return nn.Sequential(*layers, nn.Flatten(0, 1), norm.eval(), nn.Unflatten(0, (-1, PAIRS)))


def interleaved(
    x: Float[Tensor, "batch pairs dim"], y: Float[Tensor, "batch pairs 1"]
) -> Float[Tensor, "batch 2*pairs dim"]:
    """Return x_1, y_1, x_2, ...; a y stands first among zeros."""
    padded = F.pad(y, (0, x.shape[-1] - 1))
    return torch.stack((x, padded), dim=2).flatten(1, 2)


def answers(outputs: Float[Tensor, "batch 2*pairs 1"]) -> Float[Tensor, "batch pairs"]:
    """Return what is predicted at each x."""
    return outputs[:, ::2, 0]


def windowed(task: Task, count: int) -> training.Loss:
    """Return the mean loss after the last turns of the loop."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        inputs, target = task.draw(count, generator)
        found: list[Tensor] = model.predictions(*inputs, last=LAST)  # type: ignore[operator]
        return torch.stack([task.loss(outputs, target).mean() for outputs in found]).mean()

    return loss


def error(model: AlgoFormer, *, represented: bool = False, times: int | None = None) -> float:
    """Return the mean squared error of all answers; the mean of the answers as a guess gives 1."""
    inputs, target = regressions(represented).draw(HELD, Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(*inputs, times)
    return F.mse_loss(answers(outputs), target).item()
