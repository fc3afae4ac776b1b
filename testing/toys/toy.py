"""What every trainer returns: a model, something to feed it, and a way to judge its like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = Callable[..., Any]  # an `nn.Module`, an engine, a function
AnyModel = TypeVar("AnyModel", bound=nn.Module)


@dataclass(frozen=True)
class Toy:
    """A small trained model.

    Attributes:
        model: The model, in eval mode. Each trainer's call returns one of its own.
        example_inputs: Positional arguments. Quality is measured on batches of their shape, so an
            engine that was compiled for them needs no dynamic shapes.
        validation: Data the model was not trained on, whole batches of it.
        score: Measures the quality of a callable with the model's signature.
    """

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    score: Callable[[Model], dict[str, float]]

    def quality(self, model: Model | None = None) -> dict[str, float]:
        """Measure this model or another callable with its signature, such as an engine.

        The same weights give the same figures: nothing is drawn anew.
        """
        with torch.no_grad():
            return self.score(self.model if model is None else model)
