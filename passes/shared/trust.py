"""When a cache is trusted: by a schedule, or by a gate that looks at something cheap.

    gate:  error = mean |guess - probe| / mean |probe|         compute unless error < threshold

The guess is a forecast of the probe from its values on earlier steps, made before it joins them. A
rule says what it keeps from call to call, judges a step, and says what becomes of what it keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...ir.state import State
from .differences import NEVER, forecast, pushed

Named = Mapping[str, Tensor]
NOT_FINITE = "the gate of the cache is NaN or infinite: the model's first blocks give no numbers."


class Rule(nn.Module, ABC):
    """Decides on each step whether something is computed. Step 0 is always computed."""

    measures: tuple[str, ...] = ()  # names of what `judge` returns behind the decision

    @abstractmethod
    def states(self, prefix: str, shape: Sequence[int], dtype: torch.dtype) -> list[State]:
        """Return what it keeps from call to call.

        Args:
            prefix: Begins the names; the rule knows its state without.
            shape: Shape of what it looks at.
            dtype: What is kept of that in.
        """

    @abstractmethod
    def judge(self, named: Named) -> tuple[Tensor, ...]:
        """Return whether to compute, and `measures`.

        Args:
            named: `step`, what is looked at, and its own state, by name.
        """

    @abstractmethod
    def following(self, named: Named, *, computed: bool) -> dict[str, Tensor]:
        """Return what its state becomes.

        Args:
            named: As for `judge`, and what that has measured.
            computed: In which of the two cases.
        """

    def learns(self, named: Named) -> Tensor | None:
        """Say whether a step that is computed is kept in the cache; None for always."""
        return None


class Schedule(Rule):
    """Computes on the steps of a table.

    Args:
        computed: `1` for each step that is computed, `0` for the others.
        kept: `1` for each of those that is kept in the cache; all of them when left out.
    """

    flags: Bool[Tensor, " steps"]
    kept: Bool[Tensor, " steps"] | None

    def __init__(self, computed: str, kept: str | None = None) -> None:
        super().__init__()
        self.table = computed
        self.register_buffer("flags", _table(computed))
        self.register_buffer("kept", None if kept in (None, computed) else _table(str(kept)))

    def states(self, prefix: str, shape: Sequence[int], dtype: torch.dtype) -> list[State]:
        return []

    def judge(self, named: Named) -> tuple[Tensor, ...]:
        return (_look_up(self.flags, named["step"]),)

    def following(self, named: Named, *, computed: bool) -> dict[str, Tensor]:
        return {}

    def learns(self, named: Named) -> Tensor | None:
        return None if self.kept is None else _look_up(self.kept, named["step"])


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What a gate is made of.

    Attributes:
        threshold: Steps of a smaller error, added up if `accumulate`, are not computed.
        steps: Steps of a run.
        order: Of the forecast of the probe.
        basis: Of the forecast; see `differences`.
        warmup: Steps behind the first that are always computed.
        last: Compute the last step of a run.
        streak: How many steps in a row may go without; 0 for no limit.
        refresh: Follow the probe on all steps, not only on those that are computed.
        accumulate: Add errors up since the last computed step.
        coefficients: Polynomial that errors go through first, its highest power first.
        offset: Look at the difference between the probe and the value before it.
        against: What the error is relative to: `probe` or `guess`.
        reduce: `mean` of all samples together, or `max` of each sample's own error.
    """

    threshold: float
    steps: int
    order: int = 0
    basis: str = "taylor"
    warmup: int = 0
    last: bool = True
    streak: int = 0
    refresh: bool = False
    accumulate: bool = False
    coefficients: tuple[float, ...] = field(default=())
    offset: bool = False
    against: str = "probe"
    reduce: str = "mean"


class Gate(Rule):
    """Computes on the steps on which a probe was not foreseen well enough."""

    measures = ("now", "total_now")

    def __init__(self, options: GateOptions) -> None:
        super().__init__()
        self.options = options

    def states(self, prefix: str, shape: Sequence[int], dtype: torch.dtype) -> list[State]:
        orders, warning = self.options.order + 1, f"{prefix} has taken no step of this run from the"
        whole = torch.int64
        return [
            State(f"{prefix}.probe", (orders, *shape), dtype),
            State(f"{prefix}.probe_steps", (orders,), whole, NEVER),
            State(f"{prefix}.streak", dtype=whole),
            State(f"{prefix}.total"),
            State(f"{prefix}.error", initial=torch.inf),
            State(f"{prefix}.invalid", dtype=whole, faults=(NOT_FINITE,)),
            State(f"{prefix}.idle", warning=f"{warning} cache; the smallest error of its gate was"),
        ]

    def judge(self, named: Named) -> tuple[Tensor, ...]:
        options, step = self.options, named["step"]
        guess = forecast(step, named["probe"], named["probe_steps"], options.basis)
        error = relative_error(guess, self._seen(named), options.against, options.reduce)
        score = polynomial(options.coefficients, error) if options.coefficients else error
        total = named["total"] + score if options.accumulate else score
        trusted = (total < options.threshold) & self._open(named)
        if options.streak:
            trusted = trusted & (named["streak"] < options.streak)
        return ~trusted, error, total

    def following(self, named: Named, *, computed: bool) -> dict[str, Tensor]:
        step, first = named["step"], named["step"] == 0
        stack, steps = named["probe"], named["probe_steps"]
        if computed or self.options.refresh:
            stack, steps = pushed(step, self._seen(named), stack, steps, self.options.basis)
        streak = torch.zeros_like(named["streak"]) if computed else named["streak"] + 1
        total = torch.zeros_like(named["total"]) if computed else named["total_now"]
        before = torch.where(first, torch.inf, named["error"])
        error = torch.where(self._open(named), torch.minimum(before, named["now"]), before)
        hits = named["hits"] if computed else named["hits"] + 1
        unused = (step == self.options.steps - 1) & (hits == 0) & error.isfinite()
        return {
            "probe": stack,
            "probe_steps": steps,
            "streak": streak,
            "total": total if self.options.accumulate else named["total"],
            "error": error,
            "invalid": (~named["now"].isfinite()).to(torch.int64),
            "idle": torch.where(unused, error, torch.zeros_like(error)),
        }

    def _seen(self, named: Named) -> Tensor:
        seen = named["seen"].to(named["probe"].dtype)
        return seen - named["before"].to(seen.dtype) if self.options.offset else seen

    def _open(self, named: Named) -> Bool[Tensor, ""]:
        """Whether a step may go without: those at the beginning, and the last, may not."""
        step, options = named["step"], self.options
        free = step > options.warmup
        return free & (step < options.steps - 1) if options.last else free


def interval(steps: int, first: int, every: int) -> str:
    """Return `1` for the first steps of a run and each `every`-th step after them, `0` for others.

    Source: TaylorSeer-DiT, cache_functions/cal_type.py, github.com/Shenyi-Z/TaylorSeer: with the
        first steps F, F + floor((steps - F) / every) of them are computed.
    """
    full = (k < first or (k - first) % every == every - 1 for k in range(steps))
    return "".join("01"[flag] for flag in full)


def relative_error(
    guess: Float[Tensor, "batch ..."], value: Float[Tensor, "batch ..."],
    against: str, reduce: str,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return mean |guess - value| / mean |value| (or |guess|), computed in fp32.

    Args:
        guess: What was foreseen.
        value: What came.
        against: What it is relative to, `probe` for the value or `guess`.
        reduce: `mean`, over everything; `max`, the largest of the samples' own.
    """
    axes = tuple(range(1 if reduce == "max" else 0, value.dim()))
    apart, size = (guess - value).float().abs(), (value if against == "probe" else guess).float()
    error = apart.mean(axes) / size.abs().mean(axes).clamp(min=torch.finfo(torch.float32).tiny)
    return error.amax() if reduce == "max" else error


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluate a polynomial, its highest power first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _table(flags: str) -> Tensor:
    return torch.tensor([flag == "1" for flag in flags])


def _look_up(table: Tensor, step: Tensor) -> Tensor:
    """Return the entry of a step; behind the last step, where a session refuses to go, the last."""
    flag: Tensor = torch.ops.aten.index.Tensor(table, [step.clamp(max=len(table) - 1)])
    return flag
