"""What stands in the place of cached blocks: ask the rule, recall, learn; and count steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .differences import forecast, pushed
from .trust import Rule


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How a value is made of those of earlier steps.

    Attributes:
        order: Of the forecast; 0 takes the last value.
        basis: `taylor` or `newton`; see `differences`.
        offset: Forecast what is added to the input, not what is given.
        dtype: What values are kept in; None for their own type.
    """

    order: int = 0
    basis: str = "taylor"
    offset: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Frame:
    """What the inputs of the modules of a cache are.

    Attributes:
        own: How many the region has without a cache; streams that offsets are added to come first.
        results: How many values it gives without a cache.
        named: Names of the inputs behind those.
        measured: Names of what the rule has measured, behind them.
        written: Names of state, in the order of outputs.
    """

    own: int
    results: int
    named: tuple[str, ...]
    measured: tuple[str, ...]
    written: tuple[str, ...]

    def read(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs that have names."""
        return dict(zip((*self.named, *self.measured), inputs[self.own :], strict=False))

    def given(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what the region has given, behind all other inputs."""
        begin = self.own + len(self.named) + len(self.measured)
        return inputs[begin : begin + self.results]


class Judge(nn.Module):
    """Ask the rule."""

    def __init__(self, frame: Frame, rule: Rule) -> None:
        super().__init__()
        self.frame, self.rule = frame, rule

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.rule.judge(self.frame.read(inputs))
        return found if len(found) > 1 else found[0]


class Recall(nn.Module):
    """Forecast the values; what is kept stays as it is."""

    def __init__(self, frame: Frame, rule: Rule, how: Forecast) -> None:
        super().__init__()
        self.frame, self.rule, self.how = frame, rule, how

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = self.frame.read(inputs)
        step, steps = named["step"], named["value_steps"]
        values = []
        for index in range(self.frame.results):
            value = forecast(step, named[f"value_{index}"], steps, self.how.basis)
            value = value.to(inputs[0].dtype)
            values.append(inputs[index] + value if self.how.offset else value)
        following = {**named, "hits": named["hits"] + 1}
        following |= self.rule.following(named, computed=False)
        return (*values, *(following[name] for name in self.frame.written))


class Learn(nn.Module):
    """Keep the values."""

    def __init__(self, frame: Frame, rule: Rule, how: Forecast) -> None:
        super().__init__()
        self.frame, self.rule, self.how = frame, rule, how

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = self.frame.read(inputs)
        step, steps = named["step"], named["value_steps"]
        named["hits"] = torch.where(step == 0, 0, named["hits"])
        values, following = self.frame.given(inputs), dict(named)
        for index, value in enumerate(values):
            kept = value - inputs[index] if self.how.offset else value
            name = f"value_{index}"
            following[name], following["value_steps"] = pushed(
                step, kept, named[name], steps, self.how.basis
            )
        learns = self.rule.learns(named)
        if learns is not None:
            following = {k: torch.where(learns, v, named[k]) for k, v in following.items()}
        following |= self.rule.following(named, computed=True)
        return (*values, *(following[name] for name in self.frame.written))


class Tick(nn.Module):
    """Count a step, and say whether it may come now: 1 for one out of order, 2 for one too many.

    Args:
        steps: Steps of a run.
        told: Whether the caller says which step it is; step 0 begins a run then.
    """

    def __init__(self, steps: int, *, told: bool) -> None:
        super().__init__()
        self.steps, self.told = steps, told

    def forward(self, expected: Tensor, *told: Tensor) -> tuple[Tensor, Tensor]:
        step = told[0] if self.told else expected
        fault = torch.where(step < self.steps, 0, 2)
        if self.told:
            fault = torch.where((step == 0) | (step == expected), fault, 1)
        return step + 1, fault
