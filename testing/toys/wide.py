"""WideNets that read digits: variants of one small model, trained alike."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from ...models import widenet as widenet_file
from ...models.widenet import BALANCE, Routes, WideViT, WideViTConfig, balance_loss
from . import data, training, vision
from .cache import trained
from .toy import Task

CONFIG = WideViTConfig(
    image=data.SIDE,
    patch=4,
    channels=1,
    classes=data.CLASSES,
    dim=32,
    heads=4,
    depth=4,
    ffn_dim=64,
)
PLAN = training.Plan(steps=300, batch=64, rate=3e-3, warm_up=0.1)


def wide(*, balance: float = BALANCE, seed: int = 0, **changes: object) -> WideViT:
    """Return a trained WideNet of 4 calls of one block.

    Args:
        balance: Weight of the balance loss.
        seed: Draws the first weights and every batch.
        **changes: Fields of `WideViTConfig` that are unlike those of `CONFIG`.
    """
    images, _ = data.digits()
    config, plan = replace(CONFIG, **changes), replace(PLAN, seed=seed)  # type: ignore[arg-type]
    build, loss = partial(WideViT, config), balanced(vision.reading(images), plan.batch, balance)
    return trained(
        "wide",
        build,
        lambda: training.train(build, loss, plan, "wide"),
        *(config, plan, balance, widenet_file, data, vision, training, sys.modules[__name__]),
    )


def balanced(task: Task, count: int, weight: float) -> training.Loss:
    """Return the loss of a task plus that of uneven experts."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        inputs, target = task.draw(count, generator)
        routes: Routes = []
        total = task.loss(model(*inputs, routes), target).mean()
        chosen: int = model.config.chosen  # type: ignore[union-attr,assignment]
        return total + weight * balance_loss(routes, chosen) if routes else total

    return loss


def routes_of(
    model: WideViT, images: Float[Tensor, "count 1 side side"]
) -> Float[Tensor, "depth tokens experts"]:
    """Return what the router says of every token in every block."""
    routes: Routes = []
    with torch.no_grad():
        model(images, routes)
    return torch.stack(routes)
