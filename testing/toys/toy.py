"""What every trainer returns: a model, something to feed it, and a way to judge its like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

Model = Callable[..., Any]  # an `nn.Module`, an engine, a function
AnyModel = TypeVar("AnyModel", bound=nn.Module)
Inputs = tuple[Tensor, ...]  # positional arguments of one call


@dataclass(frozen=True)
class Task:
    """What a toy learns.

    Attributes:
        draw: Draws so many training examples: the inputs of one call, and what the outputs should
            be.
        loss: Compares outputs with the target, example by example.
    """

    draw: Callable[[int, Generator], tuple[Inputs, Tensor]]
    loss: Callable[[Any, Tensor], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Toy:
    """A small trained model.

    Attributes:
        model: The model, in eval mode. Each trainer's call returns one of its own.
        task: What it was trained on. Its loss is one to judge compiled models by as well.
        example_inputs: Positional arguments. Quality is measured on batches of their shape, so an
            engine that was compiled for them needs no dynamic shapes.
        validation: Data the model was not trained on, whole batches of it.
        score: Measures the quality of a callable with the model's signature.
    """

    model: nn.Module
    task: Task
    example_inputs: Inputs
    validation: Inputs
    score: Callable[[Model], dict[str, float]]

    def quality(self, model: Model | None = None) -> dict[str, float]:
        """Measure this model or another callable with its signature, such as an engine.

        The same weights give the same figures: nothing is drawn anew.
        """
        with torch.no_grad():
            return self.score(self.model if model is None else model)

    def calibration(self, count: int, seed: int = 0) -> list[Inputs]:
        """Return `count` batches of training examples, each of the shape of `example_inputs`."""
        return [inputs for inputs, _ in self.judged(count, seed)]

    def judged(self, count: int, seed: int = 0) -> list[tuple[Inputs, Tensor]]:
        """Return the batches of `calibration`, each with the target that `task.loss` compares to.

        `compile(..., calibration=toy.judged(8), loss=toy.task.loss)` is how methods get gradients.
        """
        generator = torch.Generator().manual_seed(seed)
        batch = len(self.example_inputs[0])
        return [self.task.draw(batch, generator) for _ in range(count)]
