"""One pass on one random model: what every property is asked of."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..driver.calibration import made_up
from ..driver.manager import Step, run_passes
from ..ir.errors import NoMatchError, OptionError
from ..ir.facts import objection
from ..ir.program import Program
from ..ir.run import run
from ..passes.base import Pass, Plan, Promise
from .build_program import to_program
from .configs import InputSpec, ModelConfig
from .values import inputs_of

AnyPass = Pass[Any, Any]
built = lru_cache(maxsize=256)(to_program)


@dataclass(frozen=True)
class Subject:
    """A pass and what its author says of it.

    Attributes:
        pass_: The pass, with the options to test.
        exact: Settings under which integer weights come through bit by bit; the pass itself when
            it promises exact results.
        levels: Integers up to this one are exact under those settings if every row of a weight
            reaches it; None when all are.
        idempotent: Running it again changes nothing.
        refused: Options that must be refused, each a mapping by name.
    """

    pass_: AnyPass
    exact: AnyPass | None = None
    levels: int | None = None
    idempotent: bool = True
    refused: tuple[Mapping[str, Any], ...] = ()


def make_subject(
    pass_: AnyPass,
    exact: AnyPass | None = None,
    levels: int | None = None,
    idempotent: bool = True,
    refused: tuple[Mapping[str, Any], ...] = (),
) -> Subject:
    """Return a pass with what is said of it; an exact pass is its own exact setting."""
    if exact is None and pass_.promised() is Promise.EXACT:
        exact = pass_
    return Subject(pass_, exact, levels, idempotent, refused)


@dataclass(frozen=True)
class Case:
    """A pass, a model and its inputs."""

    subject: Subject
    config: ModelConfig
    inputs: InputSpec

    @property
    def pass_(self) -> AnyPass:
        """The pass under test."""
        return self.subject.pass_

    @cached_property
    def program(self) -> Program:
        """The model, with what the pass asks its callers for."""
        return self.pass_.prepared(built(self.config))

    @cached_property
    def flat(self) -> list[Tensor]:
        """Inputs of the example's sizes."""
        return self.sized()

    def sized(self, batch: int | None = None, seq: int | None = None) -> list[Tensor]:
        """Return inputs of other sizes."""
        return list(inputs_of(self.config, self.inputs, batch, seq).values())

    @cached_property
    def applied(self) -> tuple[Program, Step] | None:
        """The new program and what was done; None where the pass finds nothing to do."""
        return apply(self.pass_, self.program)

    def retyped(self, dtype: str) -> Case:
        """Return the case in another precision."""
        return replace(self, config=replace(self.config, dtype=dtype))


def apply(
    pass_: AnyPass, program: Program, inputs: Sequence[Sequence[Tensor]] = ()
) -> tuple[Program, Step] | None:
    """Run one pass; None where it finds nothing to do, or the model is not what it asks for.

    A model whose own outputs overflow is nobody's.
    """
    try:
        new, (step,) = run_untrained(program, pass_, inputs)
    except NoMatchError:
        return None
    except OptionError:
        if any(objection(program, fact) for fact in pass_.requires) or _overflows(program, inputs):
            return None
        raise
    return (new, step) if new is not program else None


def _overflows(program: Program, inputs: Sequence[Sequence[Tensor]]) -> bool:
    """Whether a model gives NaN or infinity, so that a pass that measures has nothing to go by."""
    results = (outputs(program, flat) for flat in inputs or [made_up(program)])
    return not all(bool(y.isfinite().all()) for result in results for y in result)


def run_untrained(
    program: Program, pass_: AnyPass, inputs: Sequence[Sequence[Tensor]] = ()
) -> tuple[Program, list[Step]]:
    """Run one pass, calibrated on made-up inputs where none are given."""
    calibration = inputs or [made_up(program)]
    return run_passes(program, [pass_], inputs, calibration=calibration, recover=False)


def planned(pass_: AnyPass, program: Program) -> Plan[Any]:
    """Return what a pass plans, calibrated on made-up inputs."""
    return pass_.plan(program, pass_.measure(program, [made_up(program)]))


def outputs(program: Program, inputs: Sequence[Tensor], dtype: Any = None) -> list[Tensor]:
    """Run a program."""
    return [torch.as_tensor(value) for value in run(program, inputs, dtype=dtype)]


def eager_runs(program: Program, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Run a program as it is, and three times with every weight moved by about one rounding."""
    return [outputs(program, inputs)] + [
        outputs(_shaken(program, seed), inputs) for seed in range(3)
    ]


def _shaken(program: Program, seed: int) -> Program:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        sign = (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).to(tensor.dtype)
        return tensor * (1 + sign * torch.finfo(tensor.dtype).eps)

    return program.with_(tensors={name: moved(t) for name, t in program.tensors.items()})
