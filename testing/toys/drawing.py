"""The DiT that draws digits, and how good its drawings are."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn

from ...models import dit as dit_file
from ...models.dit import DiT, DiTConfig
from . import data, diffusion, training
from .cache import trained
from .data import Images
from .diffusion import denoising_loss
from .sampling import sample
from .toy import Model, Toy
from .vision import likeness, vit

BATCH = 40  # images in the example, in each step of scoring and of sampling
CONFIG = DiTConfig(
    latent=data.SIDE,
    patch=2,
    channels=1,
    classes=data.CLASSES,
    dim=64,
    heads=4,
    depth=4,
    ffn_dim=256,
)
PLAN = training.Plan(steps=3000, batch=32, rate=2e-3, weight_decay=0.01)


def dit() -> Toy:
    """Return a DiT of 4 blocks, 0.3 million parameters, that draws digits of 8 x 8 pixels.

    Quality is `denoising_loss`; `class_consistency`, the fraction of drawings in which the ViT sees
    the digit asked for; and `feature_distance`, the Frechet distance of drawings and validation
    images in the ViT's features: built like FID, comparable with itself alone.
    """
    images, held = data.digits()
    build, task = partial(DiT, CONFIG), diffusion.drawing(images)
    model = trained(
        "dit",
        build,
        lambda: training.train(build, training.task_loss(task, PLAN.batch), PLAN, "dit"),
        *(CONFIG, PLAN, dit_file, data, diffusion, training, sys.modules[__name__]),
    )
    judge = vit().model
    times = torch.linspace(0, diffusion.TIMES - 1, BATCH)
    return Toy(
        model=model,
        task=task,
        example_inputs=(held.images[:BATCH], times, held.labels[:BATCH]),
        validation=(held.images, held.labels),
        score=lambda model: drawing_quality(model, held, judge),
    )


def drawing_quality(model: Model, held: Images, judge: nn.Module) -> dict[str, float]:
    """Draw as many of each digit as there are validation images, and compare."""
    drawn = sample(model, held.labels, guidance=1.0, batch=BATCH)
    return {"denoising_loss": denoising_loss(model, held, BATCH), **likeness(judge, drawn, held)}
