"""Run passes: plan, rewrite, verify, certify. A failed pass leaves the program as it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..ir.errors import BlockwrightError, NoMatchError
from ..ir.program import Program
from ..ir.regions import Region
from ..ir.rewrite import rewrite
from ..ir.verify import verify
from ..passes.base import Pass, Plan
from .certify import Certificate, Inputs, Observed, certify, check_bounds, observe, reference
from .facts import check_recipe

log = logging.getLogger("blockwright.passes")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Receipt:
    """What a pass looked at and what it did.

    Attributes:
        candidates: Regions it looked at.
        changed: Labels of the regions it replaced.
        skipped: Reason by label of those it left.
        parameters: Weights before and after.
        bytes: Bytes of stored tensors before and after.
        nodes: Nodes of the flat graph before and after.
    """

    candidates: int
    changed: tuple[str, ...]
    skipped: dict[str, str]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    nodes: tuple[int, int]

    def __str__(self) -> str:
        """Render in one line."""
        rewrites = f"{len(self.changed)} rewrites, {len(self.skipped)} skips"
        return f"{rewrites}, bytes {self.bytes[0]:,} -> {self.bytes[1]:,}"


@dataclass(frozen=True)
class Step:
    """One pass as it was run.

    Attributes:
        pass_: The pass.
        plan: What it decided.
        receipt: What it did.
        certificate: What was measured; None when there was nothing to run it on.
        seconds: Wall time of each stage.
    """

    pass_: Pass[Any, Any]
    plan: Plan[Any]
    receipt: Receipt
    certificate: Certificate | None
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "pass": self.pass_.name,
            "options": self.pass_.options(),
            "promise": str(self.pass_.promise),
            "plan": self.plan.to_json(),
            "receipt": asdict(self.receipt) | {"changed": list(self.receipt.changed)},
            "certificate": self.certificate.to_json() if self.certificate else None,
        }


def run_passes(
    program: Program,
    passes: Sequence[Pass[Any, Any]],
    inputs: Sequence[Inputs] = (),
    *,
    verify_each: bool = True,
    print_ir_after: bool = False,
    progress: Progress | None = None,
) -> tuple[Program, list[Step]]:
    """Run passes in order and return the new program with one step per pass.

    Args:
        program: Where to start; it is not changed.
        passes: Passes in order.
        inputs: Flat inputs to certify on; without any, no certificate is made.
        verify_each: Check the program's invariants after each pass.
        print_ir_after: Log the program's text after each pass.
        progress: Called with (what runs, passes done, passes in all).

    Raises:
        OptionError: The list as a whole cannot work.
        NoMatchError: A pass changed nothing and may not.
        VerifyError: A pass broke an invariant or its promise.
    """
    check_recipe(passes)
    steps: list[Step] = []
    observed: Observed | None = None
    for index, pass_ in enumerate(passes):
        if progress:
            progress(pass_.name, index, len(passes))
        if inputs and observed is None:
            observed = observe(program, inputs)
        program, step, observed = _run_pass(program, pass_, inputs, observed, verify_each)
        steps.append(step)
        log.info("%s: %s", pass_, step.receipt)
        if print_ir_after:
            log.info("after %s:\n%s", pass_.name, program.text())
    if progress and passes:
        progress("passes", len(passes), len(passes))
    return program, steps


def _run_pass(
    program: Program,
    pass_: Pass[Any, Any],
    inputs: Sequence[Inputs],
    observed: Observed | None,
    verify_each: bool,
) -> tuple[Program, Step, Observed | None]:
    clock = _Stages()
    try:
        with clock("plan"):
            plan = pass_.plan(program)
            _require_match(pass_, plan)
        with clock("rewrite"):
            replaced = _replacements(program, pass_, plan)
            new = rewrite(program, replaced, by=pass_.name) if replaced else program
        if verify_each and new is not program:
            with clock("verify"):
                verify(new, by=pass_.name)
        certificate = None
        if observed is not None and new is not program:
            with clock("certify"):
                exact = reference(program, inputs)
                after = observe(new, inputs)
                bound = check_bounds(pass_, program, replaced, inputs)
                certificate = certify(pass_, program, observed, after, exact, bound)
                observed = after
    except BlockwrightError:
        raise
    except Exception as error:
        error.add_note(f"while running the pass {pass_}; the program is unchanged")
        raise
    receipt = _receipt(program, new, plan)
    return new, Step(pass_, plan, receipt, certificate, clock.seconds), observed


def _replacements(
    program: Program, pass_: Pass[Any, Any], plan: Plan[Any]
) -> list[tuple[Region, nn.Module]]:
    found: list[tuple[Region, nn.Module]] = []
    for region in pass_.regions(program):
        label = region.label
        if label in plan.decisions:
            found.append((region, pass_.replace(region, plan.decisions[label])))
    return found


def _require_match(pass_: Pass[Any, Any], plan: Plan[Any]) -> None:
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


def _receipt(old: Program, new: Program, plan: Plan[Any]) -> Receipt:
    before, after = old.cost(), new.cost()
    return Receipt(
        candidates=len(plan.decisions) + len(plan.skips),
        changed=tuple(plan.decisions),
        skipped=dict(plan.skips),
        parameters=(before.parameters, after.parameters),
        bytes=(before.weight_bytes, after.weight_bytes),
        nodes=(old.nodes(), new.nodes()),
    )


class _Stages:
    """Wall time by stage: `with clock("plan"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> _Stages:
        self._open.append((stage, time.perf_counter()))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        stage, begin = self._open.pop()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
