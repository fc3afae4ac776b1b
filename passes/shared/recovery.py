"""How a pass says what is to be trained after it; `driver.recover` does the training.

    loss = output_kl(old, new) + 0.1 * features(old, new)
    Stage("distil", weights={name: None for name in changed}, loss=loss, epochs=2, rate=1e-3)

The teacher is the program before the pass, the student the one after. A loss names the values it
compares, so that only what it needs is computed. A value of the student may be taken from the
teacher (`feeds`): what stands behind it is then trained on its own, whatever stands before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...ir.errors import OptionError
from ...ir.recognize.place import Place

Values = Sequence[Tensor]


@dataclass(frozen=True)
class Loss:
    """A number to make small. Losses add up, and numbers scale them.

    Attributes:
        student: Values of the new program it reads.
        teacher: Values of the old program it reads.
        measure: Takes both and returns a scalar.
    """

    student: tuple[Place, ...]
    teacher: tuple[Place, ...]
    measure: Callable[[Values, Values], Tensor]

    def __add__(self, other: Loss) -> Loss:
        count, known = len(self.student), len(self.teacher)

        def both(student: Values, teacher: Values) -> Tensor:
            mine = self.measure(student[:count], teacher[:known])
            return mine + other.measure(student[count:], teacher[known:])

        return Loss(self.student + other.student, self.teacher + other.teacher, both)

    def __rmul__(self, factor: float) -> Loss:
        def scaled(student: Values, teacher: Values) -> Tensor:
            return factor * self.measure(student, teacher)

        return Loss(self.student, self.teacher, scaled)


@dataclass(frozen=True)
class Fit:
    """A linear layer that begins as the best one: `after - before`, of `before`.

    Attributes:
        weight: Name of its weight in the new program, [dim, dim].
        bias: Name of its bias.
        before: What it reads, in the old program.
        after: What it should make of that, added to it.
    """

    weight: str
    bias: str
    before: Place
    after: Place


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of some weights of the new program.

    Attributes:
        name: Shown in progress bars and receipts.
        weights: What is trained, by the name of the tensor in the new program: itself (None), or
            the parameters of a module whose call gives the tensor (a low rank, a graft). In the end
            the tensor is written down, and the module is gone.
        loss: What is made small.
        fits: Layers that least squares on the calibration give a start, before anything is trained.
        held: Weights that are something else for as long as the stage trains, by name.
        feeds: Values of the new program that are taken from the old one.
        epochs: How often the calibration is gone through.
        rate: Largest learning rate of AdamW; it grows over `warm_up` of the steps and falls to
            zero along half a cosine.
        rates: Other rates, by glob patterns of parameter names within a module of `weights`.
        betas: As in AdamW.
        weight_decay: As in AdamW.
        warm_up: Fraction of the steps.
        clip: Largest norm of all gradients together; None for no limit.
        batch: Calibration sets per step; their losses are averaged.
    """

    name: str
    weights: Mapping[str, nn.Module | None]
    loss: Loss
    fits: Sequence[Fit] = ()
    held: Mapping[str, Tensor] = field(default_factory=dict)
    feeds: Sequence[tuple[Place, Place]] = ()
    epochs: int = 1
    rate: float = 1e-3
    rates: Mapping[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warm_up: float = 0.05
    clip: float | None = 1.0
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.weights:
            raise OptionError(f"the stage {self.name!r} trains no weights.")
        if self.epochs < 1 or self.rate <= 0 or self.batch < 1:
            raise OptionError(
                f"the stage {self.name!r} has epochs={self.epochs}, rate={self.rate},"
                f" batch={self.batch}.",
                remedy="use one epoch or more, a positive rate, and one set or more per step.",
            )
