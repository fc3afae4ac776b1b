"""Models and passes as a state machine: whatever happens in whatever order, programs stay sound."""

from __future__ import annotations

import json

import torch
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from ..ir.errors import OptionError
from ..ir.program import Program
from ..ir.serialize import from_json, to_json
from ..ir.verify import verify
from ..passes.base import Promise
from .case import AnyPass, built, eager_runs, outputs, run_untrained
from .configs import InputSpec, ModelConfig
from .pipelines import passes
from .snapshot import snapshot
from .strategies import models
from .tolerance import t0, t1
from .values import inputs_of


class ProgramMachine(RuleBasedStateMachine):
    """A model, changed step by step, and all the programs it has been."""

    programs: Bundle[tuple[Program, bool]] = Bundle("programs")

    @initialize(target=programs, config=models(dynamic=False))
    def capture(self, config: ModelConfig) -> tuple[Program, bool]:
        """Start with a model; the flag says that only exact passes have run."""
        self.original = built(config)
        self.inputs = list(inputs_of(config, InputSpec(kind="gauss")).values())
        self.made: list[tuple[Program, str]] = []
        return self._keep(self.original), True

    @rule(target=programs, start=programs, pass_=passes())
    def apply(self, start: tuple[Program, bool], pass_: AnyPass) -> tuple[Program, bool]:
        """Run a pass on any program there is, or have it refused."""
        program, exact = start
        try:
            new, _ = run_untrained(program, pass_)
        except OptionError as error:
            return self._refused(start, error)
        return self._keep(new), exact and pass_.promised() is Promise.EXACT

    @rule(target=programs, start=programs)
    def save_and_load(self, start: tuple[Program, bool]) -> tuple[Program, bool]:
        """Write a program as JSON and read it back."""
        program, exact = start
        read = from_json(json.loads(json.dumps(to_json(program))), dict(program.tensors))
        assert snapshot(read) == snapshot(program)
        return self._keep(read), exact

    @rule(start=programs)
    def run(self, start: tuple[Program, bool]) -> None:
        """Run a program twice; after exact passes alone it agrees with the model."""
        program, exact = start
        found = outputs(program, self.inputs)
        t0(outputs(program, self.inputs), found)
        if exact:
            truth = outputs(self.original, self.inputs, torch.float64)
            t1(found, eager_runs(self.original, self.inputs), truth)

    @rule(start=programs)
    def clone(self, start: tuple[Program, bool]) -> None:
        """Change a copy's weights; the program keeps its own."""
        program, _ = start
        before = snapshot(program)
        copy = program.with_(tensors={n: t.clone() for n, t in program.tensors.items()})
        for tensor in copy.tensors.values():
            tensor.zero_()
        assert snapshot(program) == before

    @invariant()
    def all_programs_are_sound_and_unchanged(self) -> None:
        """No step changes a program that another step made."""
        for program, before in getattr(self, "made", [])[-3:]:
            verify(program)
            assert snapshot(program) == before

    def _refused(self, start: tuple[Program, bool], error: OptionError) -> tuple[Program, bool]:
        assert error.remedy, "refused without saying what to do"
        return start

    def _keep(self, program: Program) -> Program:
        self.made.append((program, snapshot(program)))
        return program
