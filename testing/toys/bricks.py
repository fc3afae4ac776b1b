"""LEGO bricks that draw digits: refining from the whole to regions, or growing the other way.

Every brick's estimate is trained to be the clean image, so a chain may stop at any of them.

Source: Zheng et al., 2024, arXiv:2310.06389; noise, weights and sampler: Karras et al., 2022,
    arXiv:2206.00364, table 1 and algorithm 1 without added noise.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from ...models import dit as dit_file
from ...models import lego as lego_file
from ...models.lego import SIGMA_DATA, Lego, LegoConfig, chain, denoise
from . import data, training
from .cache import trained
from .data import Images
from .diffusion import LABEL_DROPOUT

SPREAD, CENTRE = 1.2, -1.2  # of the logarithm of the noise in training
NOISE = 0.02, 8.0  # range of sampling, for images from -1 to 1
REFINING = LegoConfig(
    data.SIDE, 1, data.CLASSES, dim=32, heads=4, bricks=chain("8 2", "2 1", "3 2")
)
GROWING = replace(REFINING, bricks=REFINING.bricks[::-1])
PLAIN = replace(REFINING, bricks=chain("8", "2", "11"))  # a DiT of as many multiply-adds
PLAN = training.Plan(steps=800, batch=16, rate=3e-3, weight_decay=0.01)


def bricks(config: LegoConfig = REFINING) -> Lego:
    """Return a LEGO trained on the digits; one brick alone is a plain DiT."""
    images, _ = data.digits()
    build, loss = partial(Lego, config), joint(images, PLAN.batch)
    return trained(
        "bricks",
        build,
        lambda: training.train(build, loss, PLAN, "bricks"),
        *(config, PLAN, lego_file, dit_file, data, training, sys.modules[__name__]),
    )


def joint(train: Images, count: int) -> training.Loss:
    """Return the mean of all bricks' losses; its weights make every level of noise count alike."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(train), (count,), generator=generator)
        sigma = (CENTRE + SPREAD * torch.randn(count, generator=generator)).exp()
        noise = torch.randn((count, 1, data.SIDE, data.SIDE), generator=generator)
        left_out = torch.rand(count, generator=generator) < LABEL_DROPOUT
        labels = train.labels[chosen].masked_fill(left_out, data.CLASSES)
        images = train.images[chosen]
        assert isinstance(model, Lego)
        errors = (estimates(model, images, noise, sigma, labels) - images).square().mean((2, 3, 4))
        weights = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
        return (weights * errors).mean()

    return loss


def estimates(
    model: Lego,
    images: Float[Tensor, "batch 1 side side"],
    noise: Float[Tensor, "batch 1 side side"],
    sigma: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, "bricks batch 1 side side"]:
    """Return the clean image that each brick sees behind the noise."""
    noisy = images + sigma[:, None, None, None] * noise
    return denoise(lambda x, level: torch.stack(model.estimates(x, level, labels)), noisy, sigma)


def sigmas(steps: int) -> Float[Tensor, " steps"]:
    """Return the noise of each step of sampling, from much to little."""
    low, high = (edge ** (1 / 7) for edge in NOISE)
    return torch.linspace(high, low, steps).pow(7)


def draw(
    model: Lego,
    labels: Int[Tensor, " count"],
    *,
    steps: int = 12,
    skipped: Collection[int] = (),
    during: Collection[int] = (),
) -> Float[Tensor, "count 1 side side"]:
    """Draw digits by Heun's method.

    Args:
        model: The bricks.
        labels: What to draw.
        steps: Levels of noise; each but the last takes two calls.
        skipped: Bricks left out ...
        during: ... in these steps, in both calls.
    """
    levels = sigmas(steps)
    shape = len(labels), 1, data.SIDE, data.SIDE
    x = levels[0] * torch.randn(shape, generator=Generator().manual_seed(0))
    with torch.no_grad():
        for index, sigma in enumerate(levels):
            slope = partial(_slope, model, labels, skipped if index in during else ())
            step = (levels[index + 1] if index + 1 < steps else 0) - sigma
            first = slope(x, sigma)
            there = x + step * first
            if index + 1 < steps:
                there = x + step * (first + slope(there, sigma + step)) / 2
            x = there
    return x


def _slope(
    model: Lego, labels: Tensor, skipped: Collection[int], x: Tensor, sigma: Tensor
) -> Tensor:
    def estimate(scaled: Tensor, level: Tensor) -> Tensor:
        return model.estimates(scaled, level, labels, skipped=skipped)[-1]

    return (x - denoise(estimate, x, sigma.expand(len(x)))) / sigma
