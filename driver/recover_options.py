"""How passes are trained back, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import OptionError
from ..passes.base import require_choice

Say = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Recover:
    """How passes are trained back.

    Attributes:
        steps: Steps of every stage; None for as many as the stage says.
        rate: Factor on all learning rates.
        features: `stream` runs the teacher in every step; `disk` runs it once per calibration set
            and keeps what it gave in a temporary folder.
        checkpoint: Folder that remembers a training that is killed; None to begin anew.
        every: Steps between checkpoints.
        weights: A saved engine, or a safetensors file: the trained weights are taken from it by
            name, and nothing is trained.
        seed: Seed of the random numbers a stage draws.
    """

    steps: int | None = None
    rate: float = 1.0
    features: str = "stream"
    checkpoint: str | Path | None = None
    every: int = 100
    weights: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("recover", "features", self.features, ("stream", "disk"))
        if (self.steps is not None and self.steps < 1) or self.rate <= 0 or self.every < 1:
            raise OptionError(
                f"recover: steps={self.steps}, rate={self.rate}, every={self.every}.",
                remedy="use one step or more, a positive rate, and one step or more in between.",
            )


@dataclass(frozen=True)
class Training:
    """What a stage did.

    Attributes:
        stage: Its name.
        steps: Updates; 0 when the weights were taken from a file.
        parameters: Numbers trained.
        before: Mean loss on the first calibration sets before it.
        after: Mean loss on them after it.
        kept: Whether the trained weights were kept: they are unless the loss grew.
        missing: Weights that the file they were to be taken from lacks.
    """

    stage: str
    steps: int
    parameters: int
    before: float
    after: float
    kept: bool = True
    missing: tuple[str, ...] = ()
