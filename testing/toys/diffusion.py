"""Diffusion: how noise is added to digits, and how well a model tells it from them.

    noisy = sqrt(kept) * image + sqrt(1 - kept) * noise        kept: falls from 1 to 0 over time

The model predicts the noise, given a digit or, one label further, none.

Source: Ho et al., 2020, arXiv:2006.11239, sections 3.4 and 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from .data import CLASSES, SIDE, Images
from .toy import Inputs, Model, Task

TIMES = 1000
LABEL_DROPOUT = 0.1  # how often the label is left out in training
DRAWS = 4  # noises per image in the denoising loss


def kept_signal(times: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 1 1"]:
    """Return which part of an image's variance is left at each time, 0 to 999."""
    betas = torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)
    return (1 - betas).cumprod(0)[times].float()[:, None, None, None]


def add_noise(
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    times: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Return images as they are at the given times."""
    kept = kept_signal(times)
    return kept.sqrt() * images + (1 - kept).sqrt() * noise


def predict_noise(
    model: Model,
    noisy: Float[Tensor, "batch channels height width"],
    times: Int[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Return the half of a DiT's output that is noise; the half for variance is not trained."""
    noise, _ = model(noisy, times.float(), labels).chunk(2, dim=1)
    return noise


def drawing(train: Images) -> Task:
    """Return the task of predicting the noise on random images at random times."""

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        chosen = torch.randint(len(train), (count,), generator=generator)
        times = torch.randint(TIMES, (count,), generator=generator)
        noise = torch.randn((count, 1, SIDE, SIDE), generator=generator)
        left_out = torch.rand(count, generator=generator) < LABEL_DROPOUT
        labels = train.labels[chosen].masked_fill(left_out, CLASSES)
        return (add_noise(train.images[chosen], noise, times), times.float(), labels), noise

    def loss(outputs: Tensor, noise: Tensor) -> Tensor:
        predicted, _ = outputs.chunk(2, dim=1)
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    return Task(draw, loss)


def denoising_loss(model: Model, held: Images, batch: int) -> float:
    """Return the mean squared error of the predicted noise over fixed noises and times.

    Predicting no noise at all gives 1; lower is better.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = held.images.repeat(DRAWS, 1, 1, 1), held.labels.repeat(DRAWS)
    noise = torch.randn(images.shape, generator=generator)
    times = torch.arange(len(labels)) * TIMES // len(labels)  # every time equally often
    times = times[torch.randperm(len(labels), generator=generator)]
    inputs = add_noise(images, noise, times), times, labels
    predicted = [
        predict_noise(model, *part) for part in zip(*(x.split(batch) for x in inputs), strict=True)
    ]
    return F.mse_loss(torch.cat(predicted), noise).item()
