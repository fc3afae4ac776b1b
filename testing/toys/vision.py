"""A ViT that reads digits, and what it sees in drawings of others."""

from __future__ import annotations

import sys
from functools import partial

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...models import vit as vit_file
from ...models.vit import ViT, ViTConfig
from . import data, training
from .cache import trained
from .data import Images
from .scores import accuracy, batched, frechet_distance
from .toy import Inputs, Model, Task, Toy

BATCH = 40  # images in the example and in each step of scoring
CONFIG = ViTConfig(
    image=data.SIDE,
    patch=2,
    channels=1,
    classes=data.CLASSES,
    dim=64,
    heads=4,
    depth=4,
    ffn_dim=256,
)
PLAN = training.Plan(steps=1000, batch=64, rate=1e-3, warm_up=0.1)
BLUR = 0.3  # standard deviation of the noise on training images, which run from -1 to 1


def vit() -> Toy:
    """Return a ViT of 4 blocks, 0.2 million parameters, that reads digits of 8 x 8 pixels.

    Quality is `accuracy`, a fraction, and `cross_entropy` in nats.
    """
    images, held = data.digits()
    build, task = partial(ViT, CONFIG), reading(images)
    model = trained(
        "vit",
        build,
        lambda: training.train(build, training.task_loss(task, PLAN.batch), PLAN, "vit"),
        *(CONFIG, PLAN, vit_file, data, training, sys.modules[__name__]),
    )
    return Toy(
        model=model,
        task=task,
        example_inputs=(held.images[:BATCH],),
        validation=(held.images, held.labels),
        score=lambda model: reading_quality(model, held),
    )


def reading(train: Images) -> Task:
    """Return the task of recognising random training images under noise."""

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        chosen = torch.randint(len(train), (count,), generator=generator)
        images = train.images[chosen]
        images = images + BLUR * torch.randn(images.shape, generator=generator)
        return (images,), train.labels[chosen]

    return Task(draw, partial(F.cross_entropy, reduction="none"))


def reading_quality(model: Model, held: Images) -> dict[str, float]:
    """Compare what the model reads with the labels."""
    logits = batched(model, held.images, BATCH)
    return {
        "accuracy": accuracy(logits, held.labels),
        "cross_entropy": F.cross_entropy(logits, held.labels).item(),
    }


def likeness(
    judge: nn.Module, drawn: Float[Tensor, "count 1 side side"], held: Images
) -> dict[str, float]:
    """Compare drawings of validation digits with these digits, and with their images.

    Returns:
        `class_consistency`, the fraction in which the judge sees the digit asked for, and
        `feature_distance`, the Frechet distance of what it sees in drawings and in images.
    """
    return {
        "class_consistency": accuracy(batched(judge, drawn, BATCH), held.labels),
        "feature_distance": frechet_distance(
            features(judge, drawn, BATCH), features(judge, held.images, BATCH)
        ),
    }


def features(
    model: nn.Module, images: Float[Tensor, "count 1 side side"], batch: int
) -> Float[Tensor, "count dim"]:
    """Return what the head of a ViT reads: the normalized class token."""
    seen: list[Tensor] = []
    handle = model.get_submodule("head").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    try:
        batched(model, images, batch)
    finally:
        handle.remove()
    return torch.cat(seen)
