"""First weights from which a short training gets further than from those PyTorch draws."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ...models import bert, gpt
from ...models.dit import time_waves
from .toy import AnyModel

WithPlaces = TypeVar("WithPlaces", gpt.GPT, bert.Bert)

EMBEDDING = 0.02  # standard deviation of embeddings, as in GPT-2
WAVE = 0.05  # height of the waves that tell positions apart
FOCUS = 2.0  # queries and keys, relative to what PyTorch draws


def with_small_embeddings(model: AnyModel) -> AnyModel:
    """Draw embeddings anew: a head tied to large ones starts far from uniform."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=EMBEDDING)
    return model


def with_near_sight(model: WithPlaces) -> WithPlaces:
    """Let every head begin by looking at its neighbours, and embeddings begin small.

    Keys start equal to queries, so like attends to like; positions start as waves, so neighbours
    are alike. Attention that starts uniform spends most of a short training on finding them.

    Source: after Trockman and Kolter, 2023, arXiv:2305.09828, section 3.
    Differs: keys are copies of queries, where the paper factors a sum of noise and identity; values
        are left alone.
    """
    with_small_embeddings(model)
    with torch.no_grad():
        count, dim = model.positions.weight.shape
        model.positions.weight.copy_(WAVE * time_waves(torch.arange(count), dim))
        for layer in model.modules():
            if isinstance(layer, gpt.Attention | bert.Attention):
                layer.query.weight.mul_(FOCUS)
                layer.key.weight.copy_(layer.query.weight)
    return model
