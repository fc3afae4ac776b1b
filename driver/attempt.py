"""Run one pass as a transaction: measure, plan, rewrite, recover, verify, certify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from ..ir.errors import BlockwrightError, NoMatchError, VerifyError
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
from .instrument import Instruments, Stages
from .numerics import Inputs
from .plans import arranged
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
    """

    inputs: Sequence[Inputs]
    calibration: Calibration
    verify_each: bool
    instruments: Instruments
    reproducer: Reproducer | None
    speed: SpeedGuard | None
    seed: int


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
    pass_, old, clock = attempt.pass_, attempt.old, attempt.clock
    plan, replaced, spliced = _rewrite(attempt, setting, _plan(attempt, setting))
    new, certificate = spliced, None
    if replaced:
        with clock("recover"):
            new = pass_.recover(old, spliced, plan, setting.calibration)
            _require_same_graphs(pass_, spliced, new)
    if replaced and setting.verify_each:
        with clock("verify"):
            verify(new, by=pass_.name)
    if replaced and observed is not None:
        with clock("certify"):
            after = observe(new, setting.inputs)
            first = setting.inputs[0]
            found = after.outputs[0] if new is spliced else run(spliced, first)
            check_spliced(pass_, old, replaced, first, found)
            certificate = _certify(setting, attempt, new, plan, replaced, observed, after)
            observed = after
    receipt = Receipt.of(pass_, old, new, plan)
    return new, Step(pass_, plan, receipt, certificate, clock.seconds), observed


def _rewrite(
    attempt: Attempt, setting: Setting, plan: Plan[Any]
) -> tuple[Plan[Any], Replaced, Program]:
    """Carry a plan out; return what of it was kept, the replacements, and the new program."""
    pass_, old, clock = attempt.pass_, attempt.old, attempt.clock
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


def _plan(attempt: Attempt, setting: Setting) -> Plan[Any]:
    pass_, program, clock = attempt.pass_, attempt.old, attempt.clock
    if attempt.plan is not None:
        with clock("plan"):
            attempt.plan = arranged(attempt.plan, pass_, program)
    else:
        with clock("measure"):
            evidence = pass_.measure(program, setting.calibration)
        with clock("plan"):
            attempt.plan = pass_.plan(program, evidence)
    _require_match(pass_, attempt.plan)
    return attempt.plan


def _certify(
    setting: Setting,
    attempt: Attempt,
    new: Program,
    plan: Plan[Any],
    replaced: Replaced,
    before: Observed,
    after: Observed,
) -> Certificate:
    """Write the certificate of a pass, and hold the pass to its promise."""
    pass_, old, inputs = attempt.pass_, attempt.old, setting.inputs
    decided = [(region, plan.decisions[region.label]) for region, _ in replaced]
    exact = refer(old, inputs, before, after)
    bound = check_bounds(pass_, old, replaced, inputs)
    predicted = predict(pass_, old, new, decided, inputs[0])
    costs = settle(pass_.name, predicted, after.counts)
    certificate, verdicts = certify(old, before, after, exact, bound, costs)
    hold(pass_.name, pass_.promise, verdicts, bound)
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


def _require_same_graphs(pass_: AnyPass, spliced: Program, recovered: Program) -> None:
    """Recovery may give weights other values and nothing else."""
    if recovered is not spliced and recovered.text() != spliced.text():
        raise VerifyError(
            f"{pass_.name} changed the graph while recovering.",
            remedy="recover returns new.with_(tensors=...): the same graphs over better weights.",
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
