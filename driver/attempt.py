"""Run one pass as a transaction: measure, plan, rewrite, calibrate, recover, verify, certify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn

from ..ir.errors import BlockwrightError, NoMatchError
from ..ir.program import Program
from ..ir.regions import Region
from ..ir.rewrite import rewrite
from ..ir.run import run
from ..ir.verify import verify
from ..passes.base import Calibration, Pass, Plan
from .account import predict, settle
from .bounds import check_bounds, check_spliced
from .calibration import CERTIFIED_SETS
from .casefile import versions
from .certify import Certificate, Observed, certify, hold, observe, refer
from .completed import completed
from .instrument import Instruments, Stages
from .numerics import Inputs
from .plans import arranged, require_carried_out
from .recover import Recover, Say, Training, calibrated, recover, require_taken
from .reproducer import Case, Reproducer, attach, error_text
from .speed import SpeedGuard
from .steps import Receipt, Step
from .transaction import transaction

AnyPass = Pass[Any, Any]
Replaced = list[tuple[Region, nn.Module]]


@dataclass(frozen=True)
class Setting:
    """What is the same for every pass of a recipe.

    Attributes:
        inputs: Flat inputs to certify on; none for no certificate.
        calibration: Flat inputs to measure and recover on.
        verify_each: Whether to check invariants after the pass.
        instruments: What to show.
        reproducer: Where a failing case goes.
        speed: Takes back what is slower.
        seed: Seed of random numbers.
        recover: How to train what a pass wants trained; None not to.
        say: Is told how far a training is.
    """

    inputs: Sequence[Inputs]
    calibration: Calibration
    verify_each: bool
    instruments: Instruments
    reproducer: Reproducer | None
    speed: SpeedGuard | None
    seed: int
    recover: Recover | None = None
    say: Say | None = None

    def fitting(self, program: Program) -> Setting:
        """Return the setting with inputs for a program that passes have given more arguments."""
        inputs = [program.completed(flat) for flat in self.inputs]
        return replace(self, inputs=inputs, calibration=completed(program, self.calibration))


@dataclass
class Attempt:
    """A pass on its way, as far as it got.

    Attributes:
        pass_: The pass.
        old: The program it was given.
        plan: A plan from outside, or what it has decided; None before that.
        clock: Times of its stages.
    """

    pass_: AnyPass
    old: Program
    plan: Plan[Any] | None
    clock: Stages


def run_attempt(
    attempt: Attempt, setting: Setting, observed: Observed | None
) -> tuple[Program, Step, Observed | None]:
    """Run one pass; on failure leave what helps to find out why.

    Args:
        attempt: The pass and the program.
        setting: What is the same for every pass.
        observed: What the program gave on the inputs; None to certify nothing.

    Returns:
        The new program, what is kept of the pass, and what the new program gave.
    """
    pass_, old = attempt.pass_, attempt.old
    setting.instruments.before(pass_, old)
    try:
        with transaction(old, pass_.name, setting.seed):
            new, step, observed = _run(attempt, setting, observed)
    except Exception as error:
        if not isinstance(error, BlockwrightError):
            error.add_note(f"while running the pass {pass_}; the program is unchanged")
        setting.instruments.failed(pass_, old)
        if setting.reproducer is not None:
            attach(setting.reproducer, _case(attempt, setting, error), error)
        raise
    setting.instruments.after(pass_, old, new)
    return new, step, observed


def _run(
    attempt: Attempt, setting: Setting, observed: Observed | None
) -> tuple[Program, Step, Observed | None]:
    unprepared, attempt.old = attempt.old, attempt.pass_.prepared(attempt.old)
    pass_, old, clock = attempt.pass_, attempt.old, attempt.clock
    given, new, rounds = attempt.plan, old, list[Round]()
    for number in range(max(1, pass_.rounds(old))):
        round_ = _round(attempt, setting, given, new, number)
        new = round_.new
        rounds.append(round_)
        if not round_.replaced:
            break
    plan = _joined([round_.plan for round_ in rounds])
    if given is not None:
        require_carried_out(given, plan, pass_)
    trained = tuple(training for round_ in rounds for training in round_.trained)
    if setting.recover is not None:
        require_taken(new, trained, setting.recover)
    replaced, certificate = any(round_.replaced for round_ in rounds), None
    new = new if replaced else unprepared
    if replaced and setting.verify_each:
        with clock("verify"):
            verify(new, by=pass_.name)
    if replaced and observed is not None:
        with clock("certify"):
            pass_.check(unprepared, new, setting.inputs[0])
            after = observe(new, setting.inputs)
            for round_ in rounds:
                _check_round(pass_, round_, setting.inputs[0])
            certificate = _certify(setting, attempt, new, plan, rounds, observed, after)
            observed = after
    receipt = Receipt.of(pass_, old, new, plan, trained)
    return new, Step(pass_, plan, receipt, certificate, clock.seconds), observed


@dataclass(frozen=True)
class Round:
    """What one round of a pass did; most passes have one.

    Attributes:
        old: The program before it.
        plan: What of the plan it carried out.
        replaced: Regions of the program before it, and what stands in their places.
        spliced: The program before training.
        new: The program after it.
        trained: What training did.
    """

    old: Program
    plan: Plan[Any]
    replaced: Replaced
    spliced: Program
    new: Program
    trained: tuple[Training, ...]


def _round(
    attempt: Attempt, setting: Setting, given: Plan[Any] | None, old: Program, number: int
) -> Round:
    """Plan, rewrite and recover once."""
    pass_, clock = attempt.pass_, attempt.clock
    part = None if given is None else pass_.part(given, number)
    attempt.plan = _plan(attempt, setting, old, part)
    if number == 0:
        _require_match(pass_, attempt.plan)
    plan, replaced, spliced = _rewrite(attempt, setting, old, attempt.plan)
    with clock("calibrate"):
        new = calibrated(pass_, old, spliced, plan, setting.calibration)
    trained = tuple[Training, ...]()
    if replaced and setting.recover is not None:
        with clock("recover"):
            stages = pass_.recovery(old, new, plan)
            new, trained = recover(
                old, new, stages, setting.calibration, setting.recover, by=pass_.name,
                say=setting.say,
            )  # fmt: skip
    return Round(old, plan, replaced, spliced, new, trained)


def _check_round(pass_: AnyPass, round_: Round, inputs: Inputs) -> None:
    """Compare what was spliced in with the modules a pass gave."""
    if round_.replaced:
        found = run(round_.spliced, inputs)
        check_spliced(pass_, round_.old, round_.replaced, inputs, found)


def _joined(plans: Sequence[Plan[Any]]) -> Plan[Any]:
    """Return one plan of several rounds; what one round skips another may decide about."""
    decisions = {label: d for plan in plans for label, d in plan.decisions.items()}
    skips = {label: reason for plan in plans for label, reason in plan.skips.items()}
    return Plan(decisions, {k: v for k, v in skips.items() if k not in decisions})


def _rewrite(
    attempt: Attempt, setting: Setting, old: Program, plan: Plan[Any]
) -> tuple[Plan[Any], Replaced, Program]:
    """Carry a plan out; return what of it was kept, the replacements, and the new program."""
    pass_, clock = attempt.pass_, attempt.clock
    with clock("rewrite"):
        replaced = _replacements(old, pass_, plan)
        new = rewrite(old, replaced, by=pass_.name) if replaced else old
    if setting.speed is None or not replaced or not setting.inputs:
        return plan, replaced, new
    with clock("speed"):
        slow = setting.speed.slower(old, new, replaced, setting.inputs[0])
    if slow:
        replaced = [pair for pair in replaced if pair[0].label not in slow]
        new = rewrite(old, replaced, by=pass_.name) if replaced else old
    return _without(plan, slow), replaced, new


def _plan(
    attempt: Attempt, setting: Setting, program: Program, given: Plan[Any] | None
) -> Plan[Any]:
    pass_, clock = attempt.pass_, attempt.clock
    if given is not None:
        with clock("plan"):
            return arranged(given, pass_, program)
    with clock("measure"):
        evidence = pass_.measure(program, setting.calibration)
    with clock("plan"):
        return pass_.plan(program, evidence)


def _certify(
    setting: Setting,
    attempt: Attempt,
    new: Program,
    plan: Plan[Any],
    rounds: Sequence[Round],
    before: Observed,
    after: Observed,
) -> Certificate:
    """Write the certificate of a pass, and hold the pass to its promise."""
    pass_, old, inputs = attempt.pass_, attempt.old, setting.inputs
    replaced = rounds[0].replaced
    decided = [(region, plan.decisions[region.label]) for r in rounds for region, _ in r.replaced]
    exact = refer(old, inputs, before, after)
    bound = check_bounds(pass_, old, replaced, inputs)
    predicted = predict(pass_, old, new, decided, inputs[0])
    costs = settle(pass_.name, predicted, after.counts)
    certificate, verdicts = certify(old, before, after, exact, bound, costs)
    hold(pass_.name, pass_.promised(), verdicts, bound)
    return certificate


def _replacements(program: Program, pass_: AnyPass, plan: Plan[Any]) -> Replaced:
    found: Replaced = []
    for region in pass_.regions(program):
        label = region.label
        if label in plan.decisions:
            found.append((region, pass_.replace(region, plan.decisions[label])))
    return found


def _without(plan: Plan[Any], reasons: Mapping[str, str]) -> Plan[Any]:
    """Return a plan that leaves some regions alone after all, and says why."""
    kept = {label: d for label, d in plan.decisions.items() if label not in reasons}
    return Plan(kept, {**plan.skips, **reasons})


def _require_match(pass_: AnyPass, plan: Plan[Any]) -> None:
    """Zero changes is an error, with the reasons, unless the caller accepts it."""
    if plan.decisions or pass_.allow_no_match:
        return
    kinds = " or ".join(kind.kind for kind in pass_.region_kinds())
    reasons = [f"{label} {reason}" for label, reason in plan.skips.items()]
    found = f"skipped all {len(reasons)}" if reasons else f"found no {kinds}"
    raise NoMatchError(
        f"{pass_.name} changed nothing: it {found}{': ' + reasons[0] if reasons else ''}.",
        remedy="check its options with `blockwright passes`, or set allow_no_match=true.",
    )


def _case(attempt: Attempt, setting: Setting, error: Exception) -> Case:
    sets: Iterable[Inputs] = setting.calibration
    return Case(
        pass_=attempt.pass_,
        program=attempt.old,
        inputs=setting.inputs,
        calibration=list(islice(sets, CERTIFIED_SETS)),
        plan=attempt.plan,
        seed=setting.seed,
        verify_each=setting.verify_each,
        error=error_text(error),
        versions=versions(),
    )
