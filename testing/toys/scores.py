"""Figures of quality, each a plain function of tensors or of a callable."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def bits_per_character(
    model: Callable[[Tensor], Tensor], windows: Int[Tensor, "count length"], batch: int
) -> float:
    """Return the mean cross-entropy of each character given those before it in its window, in bits.

    A model that knows nothing takes log2(vocab); lower is better.
    """
    total = 0.0
    for part in windows.split(batch):
        logits = model(part[:, :-1].contiguous())
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return bits(total / windows[:, 1:].numel())


def bits(nats: float) -> float:
    """Convert a unit of information."""
    return nats / math.log(2)


def batched(
    model: Callable[[Tensor], Tensor], inputs: Float[Tensor, "count ..."], batch: int
) -> Float[Tensor, "count outputs"]:
    """Return what the model returns, calling it on `batch` inputs at a time."""
    return torch.cat([model(part) for part in inputs.split(batch)])


def accuracy(logits: Float[Tensor, "count classes"], labels: Int[Tensor, " count"]) -> float:
    """Return the fraction of rows whose largest logit is at the label."""
    return (logits.argmax(-1) == labels).double().mean().item()


def frechet_distance(
    first: Float[Tensor, "count features"], second: Float[Tensor, "others features"]
) -> float:
    """Return the squared Frechet distance of two normal distributions fitted to features.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    Source: Dowson and Landau, 1982; Heusel et al., 2017, arXiv:1706.08500, section 3, which takes
        the features from Inception and calls it FID.
    """
    a, b = first.double(), second.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # C1 C2 is similar to a positive semidefinite matrix: its eigenvalues are real but for rounding.
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * roots.sum()).item()
