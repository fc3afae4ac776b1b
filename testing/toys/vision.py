"""A ViT that reads digits, and what it sees in drawings of others."""

from __future__ import annotations

import sys

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...models import vit as vit_file
from ...models.vit import ViT, ViTConfig
from . import data, training
from .cache import trained
from .data import Images
from .scores import accuracy, batched
from .toy import Model, Toy

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
    model = trained(
        "vit",
        lambda: ViT(CONFIG),
        lambda: training.train(lambda: ViT(CONFIG), reading_loss(images, PLAN.batch), PLAN, "vit"),
        *(CONFIG, PLAN, vit_file, data, training, sys.modules[__name__]),
    )
    return Toy(
        model=model,
        example_inputs=(held.images[:BATCH],),
        validation=(held.images, held.labels),
        score=lambda model: reading_quality(model, held),
    )


def reading_loss(train: Images, count: int) -> training.Loss:
    """Return the loss of recognising `count` random training images under noise."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(train), (count,), generator=generator)
        images = train.images[chosen]
        images = images + BLUR * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images), train.labels[chosen])

    return loss


def reading_quality(model: Model, held: Images) -> dict[str, float]:
    """Compare what the model reads with the labels."""
    logits = batched(model, held.images, BATCH)
    return {
        "accuracy": accuracy(logits, held.labels),
        "cross_entropy": F.cross_entropy(logits, held.labels).item(),
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
