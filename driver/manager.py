"""Run a recipe: check it whole, then pass by pass; see `driver.attempt` for one of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ir.plain import plain
from ..ir.program import Program
from ..passes.base import Calibration, Pass
from .attempt import Attempt, Setting, run_attempt
from .casefile import inputs_hash
from .certify import Observed, observe
from .facts import check_recipe
from .instrument import Instruments, Stages, Which
from .numerics import Inputs
from .order import ordered
from .plans import Plans, read_plans
from .recover import Recover
from .reproducer import Reproducer
from .resume import Checkpoint
from .speed import SpeedGuard
from .steps import Receipt, Step

__all__ = ["Receipt", "Step", "run_passes"]
log = logging.getLogger("blockwright.passes")
AnyPass = Pass[Any, Any]
Progress = Callable[[str, int, int], None]


def run_passes(
    program: Program,
    passes: Sequence[AnyPass],
    inputs: Sequence[Inputs] = (),
    *,
    calibration: Calibration | None = None,
    plans: Plans | None = None,
    order: str = "given",
    verify_each: bool = True,
    print_ir_after: Which = False,
    instruments: Instruments | None = None,
    reproducer: Reproducer | str | Path | None = None,
    checkpoint: str | Path | None = None,
    speed: SpeedGuard | None = None,
    recover: Recover | bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Program, list[Step]]:
    """Run passes in order and return the new program with one step per pass.

    Args:
        program: Where to start; it is not changed.
        passes: Passes in order.
        inputs: Flat inputs to certify on; without any, no certificate is made.
        calibration: Flat inputs to measure and recover on; `inputs` when left out.
        plans: Plans to carry out instead of deciding; see `driver.plans`.
        order: `given`, or `auto` to solve an order from the facts passes require and end.
        verify_each: Check the program's invariants after each pass.
        print_ir_after: Log the program's text after each pass, or after those named.
        instruments: What else to show.
        reproducer: Directory that gets the case when a pass fails.
        checkpoint: Directory that remembers passes done, for a compile that is killed.
        recover: How to train what passes want trained back; False not to. Without a calibration
            nothing is trained.
        speed: Reverts replacements that are slower; None to leave speed alone.
        seed: Seed of random numbers passes draw.
        progress: Called with (what runs, passes done, passes in all).

    Raises:
        OptionError: The list as a whole cannot work, or a plan is not one of its pass.
        NoMatchError: A pass changed nothing and may not.
        VerifyError: A pass broke an invariant or its promise.
    """
    passes = ordered(passes, order)
    check_recipe(passes, program)
    given = read_plans(plans, passes)
    instruments = instruments or Instruments(print_ir_after=print_ir_after)
    instruments.check(passes)
    case = Reproducer(Path(reproducer)) if isinstance(reproducer, str | Path) else reproducer
    stream = inputs if calibration is None else calibration
    training = Recover() if recover is True else recover or None
    if training is not None and training.checkpoint is None and checkpoint is not None:
        training = replace(training, checkpoint=Path(checkpoint) / "training")
    setting = Setting(
        inputs, stream, verify_each, instruments, case, speed, seed,
        recover=training if calibration is not None else None, say=progress,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        store: Checkpoint | None = None
        steps: list[Step] = []
        if checkpoint is not None and passes:
            about = _about(setting, passes)
            store = Checkpoint(Path(checkpoint), program, passes, given, about)
            stack.enter_context(store)
            program, steps = store.restore()
            for note in store.notes:
                instruments.say("checkpoint", note)
        observed: Observed | None = None
        for index in range(len(steps), len(passes)):
            pass_ = passes[index]
            if progress:
                progress(pass_.name, index, len(passes))
            fitting = setting.fitting(program)
            if inputs and observed is None:
                observed = observe(program, fitting.inputs)
            attempt = Attempt(pass_, program, given[index], Stages())
            program, step, observed = run_attempt(attempt, fitting, observed)
            steps.append(step)
            if store is not None:
                store.save(index, program, step)
            log.info("%s: %s", pass_, step.receipt)
    if progress and passes:
        progress("passes", len(passes), len(passes))
    instruments.finish(steps)
    return program, steps


def _about(setting: Setting, passes: Sequence[AnyPass]) -> dict[str, Any]:
    """Return what the results of passes depend on beside the model and themselves."""
    calibrated = any(pass_.calibrates() for pass_ in passes)
    return {
        "inputs": inputs_hash(setting.inputs),
        "calibration": inputs_hash(setting.calibration) if calibrated else None,
        "settings": {
            "seed": setting.seed,
            "verify_each": setting.verify_each,
            "speed": setting.speed is not None,
            "recover": _lasting(setting.recover) if calibrated else None,
        },
    }


def _lasting(recover: Recover | None) -> Any:
    """Return what of a training's options its result depends on."""
    return plain(recover and replace(recover, checkpoint=None, every=1, features="stream"))
