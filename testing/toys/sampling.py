"""Sampling: from noise to digits along the way a diffusion model points out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...ir.errors import OptionError
from .data import CLASSES, SIDE
from .diffusion import TIMES, add_noise, kept_signal, predict_noise
from .toy import Model


def sample(
    model: Model,
    labels: Int[Tensor, " count"],
    *,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    batch: int = 40,
) -> Float[Tensor, "count 1 side side"]:
    """Draw digits by DDIM without randomness of its own: the seed gives the first noise.

    Args:
        model: A callable with the signature of `DiT`.
        labels: What to draw, 0 to 9.
        steps: Calls along the way from noise to image, 1 to 1000.
        guidance: 1 follows the label; more exaggerates it, at twice the calls.
        seed: Of the noise.
        batch: Images per call; it divides the number of labels if the model has a fixed batch.

    Raises:
        OptionError: `steps` is out of range.

    Source: Song et al., 2021, arXiv:2010.02502, equation 12 with sigma = 0; guidance: Ho and
        Salimans, 2022, arXiv:2207.12598, equation 6 with guidance = 1 + w.
    Differs: the image predicted at each step is clamped to the range of pixels.
    """
    if not 1 <= steps <= TIMES:
        raise OptionError(f"steps={steps}: sampling takes 1 to {TIMES} steps.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(labels), 1, SIDE, SIDE), generator=generator)
    parts = zip(noise.split(batch), labels.split(batch), strict=True)
    with torch.no_grad():
        return torch.cat([_denoise(model, *part, steps, guidance) for part in parts])


def _denoise(model: Model, x: Tensor, labels: Tensor, steps: int, guidance: float) -> Tensor:
    times = torch.linspace(TIMES - 1, 0, steps).round().long()
    for index, time in enumerate(times):
        now = time.expand(len(labels))
        kept = kept_signal(now)
        noise = _guided(model, x, now, labels, guidance)
        image = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        if index + 1 == steps:
            break
        # The noise that leads from the clamped image to x, not the one predicted.
        noise = (x - kept.sqrt() * image) / (1 - kept).sqrt()
        x = add_noise(image, noise, times[index + 1].expand(len(labels)))
    return image


def _guided(model: Model, x: Tensor, times: Tensor, labels: Tensor, guidance: float) -> Tensor:
    told = predict_noise(model, x, times, labels)
    if guidance == 1:
        return told
    free = predict_noise(model, x, times, torch.full_like(labels, CLASSES))
    return free + guidance * (told - free)
