"""The FLUX that draws digits by their names, and how good its drawings are."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn

from ...models import flux as flux_file
from ...models import mmdit as mmdit_file
from ...models.flux import Flux, FluxConfig
from . import data, diffusion, flow, training
from .cache import trained
from .data import Images
from .toy import Model, Toy
from .vision import likeness, vit

BATCH = 40  # images in the example, in each step of scoring and of sampling
CONFIG = FluxConfig(
    channels=flow.PATCH**2,
    text_dim=flow.LETTERS,
    pooled_dim=1,
    dim=64,
    heads=4,
    double_depth=2,
    single_depth=2,
    ffn_dim=256,
    axes=(4, 6, 6),
    theta=100.0,
    guidance=False,
)
PLAN = training.Plan(steps=2000, batch=32, rate=2e-3, weight_decay=0.01)


def flux() -> Toy:
    """Return a FLUX of 2 double and 2 single blocks that draws digits of 8 x 8 pixels.

    It is told the digit's name in letters. Quality is `velocity_loss`, and `class_consistency` and
    `feature_distance` as of the DiT.
    """
    images, held = data.digits()
    build, task = partial(Flux, CONFIG), flow.drawing(images)
    model = trained(
        "flux",
        build,
        lambda: training.train(build, training.task_loss(task, PLAN.batch), PLAN, "flux"),
        *(CONFIG, PLAN, flux_file, mmdit_file),
        *(data, diffusion, flow, training, sys.modules[__name__]),
    )
    judge = vit().model
    example = flow.patches(held.images[:BATCH]), torch.linspace(0, 1, BATCH), held.labels[:BATCH]
    return Toy(
        model=model,
        task=task,
        example_inputs=flow.inputs(*example),
        validation=(held.images, held.labels),
        score=lambda model: painting_quality(model, held, judge),
    )


def painting_quality(model: Model, held: Images, judge: nn.Module) -> dict[str, float]:
    """Draw as many of each digit as there are validation images, and compare."""
    drawn = flow.flow_sample(model, held.labels, batch=BATCH)
    return {"velocity_loss": flow.velocity_loss(model, held, BATCH), **likeness(judge, drawn, held)}
