"""Runs of a sampler with a cache and without, from the same noises: what it costs, and saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backends.engine import Engine, Session
from ..backends.registry import get_backend
from ..driver.manager import run_passes
from ..ir.capture import capture
from ..ir.program import Program
from ..passes.base import Pass
from .toys.sampling import sample
from .toys.toy import Model, Toy

COUNT = 20  # drawings of a run
SEEDS = (0, 1, 2)


class Followed:
    """A session that is called like the model, and remembers what was left out.

    Attributes:
        hits: How often each part was left out, by step and by the name of its count.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.hits = session, list[dict[str, int]]()

    def __call__(self, *args: Tensor) -> Any:
        result = self.session(*args)
        state = self.session.state_dict().items()
        self.hits.append({name: int(v) for name, v in state if name.endswith(".hits")})
        return result

    @property
    def full(self) -> str:
        """`1` for each step on which nothing was left out, `0` for the others."""
        sums = [0, *(sum(hits.values()) for hits in self.hits)]
        return "".join("01"[a == b] for a, b in pairwise(sums))


class SamplerRuns:
    """Draws digits with caches and without.

    Args:
        toy: A DiT that draws digits.
    """

    def __init__(self, toy: Toy) -> None:
        self.model = toy.model
        self.program = capture(toy.model, tuple(value[:COUNT] for value in toy.example_inputs))
        self.depth = len(self.program.blocks())
        self._plain: dict[tuple[int, int], Tensor] = {}

    def plain(self, seed: int, steps: int) -> Tensor:
        """Draw without a cache."""
        if (seed, steps) not in self._plain:
            self._plain[seed, steps] = draw(self.model, seed, steps)
        return self._plain[seed, steps]

    def fewer(self, fewer: int, steps: int) -> float:
        """Return the error of a run of fewer steps."""
        return self._error(lambda seed: self.plain(seed, fewer), steps)

    def cached(self, pass_: Pass[Any, Any], steps: int) -> tuple[float, list[str]]:
        """Return the error with a cache, and for each seed which steps were full."""
        engine, masks = engine_of(self.program, pass_), list[str]()

        def drawn(seed: int) -> Tensor:
            followed = Followed(engine.session())
            image = draw(followed, seed, steps)
            masks.append(followed.full)
            return image

        return self._error(drawn, steps), masks

    def _error(self, drawn: Callable[[int], Tensor], steps: int) -> float:
        """Return the relative distance of drawings from those of the model, over the seeds."""
        pairs = [(drawn(seed), self.plain(seed, steps)) for seed in SEEDS]
        return statistics.mean(float((a - b).norm() / b.norm()) for a, b in pairs)


def draw(model: Model, seed: int, steps: int) -> Tensor:
    """Draw two of each digit."""
    labels = torch.arange(COUNT) % 10
    return sample(model, labels, steps=steps, guidance=1.0, seed=seed, batch=COUNT)


def engine_of(program: Program, pass_: Pass[Any, Any], backend: str = "eager") -> Engine:
    """Return an engine of what one pass makes of a program."""
    new, _ = run_passes(program, [pass_])
    return Engine(new, get_backend(backend).lower(new, {"threads": 1}), backend, {})
