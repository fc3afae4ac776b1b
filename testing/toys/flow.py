"""Flow matching: how noise is mixed into digits, and how well a model points back at them.

    noisy = (1 - time) * image + time * noise          time: 0 to 1
    velocity = noise - image                           what the model predicts

The model reads patches of the noisy image, and the English name of the digit as text, a letter per
token. Where the name is left out, all letters are blank. The pooled text says only how long it is,
so that what to draw is known from the tokens alone.

Source: Lipman et al., 2023, arXiv:2210.02747, example II of section 4.1; straight paths: Liu et
    al., 2023, arXiv:2209.03003, equation 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from .data import CLASSES, SIDE, Images
from .diffusion import DRAWS, LABEL_DROPOUT
from .toy import Inputs, Model, Task

PATCH = 2  # height and width of a patch in pixels
NAMES = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", ""
WORDS = max(map(len, NAMES))  # letters of the longest name
LETTERS = 27  # the alphabet, after it the blank
_ROWS = SIDE // PATCH


def name_tokens(labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch words letters"]:
    """Return names of digits, a letter per token, each 1 at its place in the alphabet."""
    rows = [[ord(letter) - ord("a") for letter in name.ljust(WORDS, "{")] for name in NAMES]
    return F.one_hot(torch.tensor(rows), LETTERS).float()[labels]


def patches(
    images: Float[Tensor, "batch 1 side side"],
) -> Float[Tensor, "batch patches pixels"]:
    """Cut images into patches, row by row."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def images_of(x: Float[Tensor, "batch patches pixels"]) -> Float[Tensor, "batch 1 side side"]:
    """Put patches together again."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (_ROWS, _ROWS)), PATCH)


def inputs(
    noisy: Float[Tensor, "batch patches pixels"],
    times: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
) -> Inputs:
    """Return what a FLUX is called with; label 10 leaves the name out."""
    text = name_tokens(labels)
    pooled = 1 - text[..., -1].mean(1, keepdim=True)  # the fraction of tokens that are letters
    along = torch.arange(float(_ROWS))
    return noisy, text, pooled, times, torch.cartesian_prod(torch.zeros(1), along, along)


def mixed(images: Tensor, noise: Tensor, times: Float[Tensor, " batch"]) -> Tensor:
    """Return what lies between images and noise at the given times."""
    return torch.lerp(images, noise, times[:, None, None])


def drawing(train: Images) -> Task:
    """Return the task of predicting velocities of random images at random times."""
    images = patches(train.images)

    def draw(count: int, generator: Generator) -> tuple[Inputs, Tensor]:
        chosen = torch.randint(len(train), (count,), generator=generator)
        times = torch.rand(count, generator=generator)
        noise = torch.randn((count, *images.shape[1:]), generator=generator)
        left_out = torch.rand(count, generator=generator) < LABEL_DROPOUT
        labels = train.labels[chosen].masked_fill(left_out, CLASSES)
        image = images[chosen]
        return inputs(mixed(image, noise, times), times, labels), noise - image

    def loss(outputs: Tensor, velocity: Tensor) -> Tensor:
        return (outputs - velocity).square().mean(dim=(1, 2))

    return Task(draw, loss)


def velocity_loss(model: Model, held: Images, batch: int) -> float:
    """Return the mean squared error of the velocity over fixed noises and times.

    Predicting none at all gives 1.73, the mean squares of noise and images together.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = patches(held.images).repeat(DRAWS, 1, 1), held.labels.repeat(DRAWS)
    noise = torch.randn(images.shape, generator=generator)
    times = torch.linspace(0, 1, len(labels))[torch.randperm(len(labels), generator=generator)]
    predicted = velocities(model, mixed(images, noise, times), times, labels, batch)
    return F.mse_loss(predicted, noise - images).item()


def flow_sample(
    model: Model, labels: Int[Tensor, " count"], *, steps: int = 20, seed: int = 0, batch: int = 40
) -> Float[Tensor, "count 1 side side"]:
    """Draw digits by following the velocity from noise to image in equal steps, after Euler.

    Args:
        model: A callable with the signature of `Flux`.
        labels: What to draw, 0 to 9.
        steps: Calls along the way.
        seed: Of the noise.
        batch: Images per call; it divides the number of labels if the model has a fixed batch.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(labels), _ROWS**2, PATCH**2), generator=generator)
    with torch.no_grad():
        for step in range(steps, 0, -1):
            times = torch.full((len(labels),), step / steps)
            x = x - velocities(model, x, times, labels, batch) / steps
    return images_of(x).clamp(-1, 1)


def velocities(
    model: Model,
    noisy: Float[Tensor, "count patches pixels"],
    times: Float[Tensor, " count"],
    labels: Int[Tensor, " count"],
    batch: int,
) -> Float[Tensor, "count patches pixels"]:
    """Return what the model predicts, calling it on `batch` inputs at a time."""
    parts = zip(noisy.split(batch), times.split(batch), labels.split(batch), strict=True)
    return torch.cat([model(*inputs(*part)) for part in parts])
