"""Watch passes run: times, node counts, graphs as text, counters. Names follow MLIR.

Source: https://mlir.llvm.org/docs/PassManagement/ (IR printing, pass timing, pass statistics).
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import Pass
from .steps import Step

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("blockwright.passes")
STAGES = ("measure", "plan", "rewrite", "calibrate", "recover", "verify", "certify", "speed")
Which = bool | str | Sequence[str]


@dataclass(frozen=True)
class Instruments:
    """What to show while passes run.

    Attributes:
        print_ir_before: Show the program before passes: True for all, or names of passes.
        print_ir_after: Show it after passes, likewise.
        print_ir_after_change: Leave out the text after a pass that changed nothing.
        print_ir_after_failure: Show the program a failing pass was given.
        timing: Show a table of times at the end.
        statistics: Show the counters of receipts at the end.
        say: Takes a title and a text; the log of `blockwright.passes` by default.
    """

    print_ir_before: Which = False
    print_ir_after: Which = False
    print_ir_after_change: bool = False
    print_ir_after_failure: bool = False
    timing: bool = False
    statistics: bool = False
    say: Callable[[str, str], None] = field(
        default=lambda title, text: log.info("%s:\n%s", title, text), repr=False
    )

    def check(self, passes: Sequence[Pass[Any, Any]]) -> None:
        """Refuse names of passes that do not run.

        Raises:
            OptionError: Names the first.
        """
        known = [pass_.name for pass_ in passes]
        for name in (*_names(self.print_ir_before), *_names(self.print_ir_after)):
            if name not in known:
                raise OptionError(
                    f"no pass {name!r} runs, so no IR can be printed around it.",
                    remedy=f"name one of {', '.join(known) or 'the passes of a recipe'}.",
                )

    def before(self, pass_: Pass[Any, Any], program: Program) -> None:
        """Take note that a pass is about to run."""
        if _asks(self.print_ir_before, pass_):
            self._print("before", pass_, program)

    def after(self, pass_: Pass[Any, Any], old: Program, new: Program) -> None:
        """Take note that a pass has run."""
        changed = new is not old
        asked = _asks(self.print_ir_after, pass_) or (
            self.print_ir_after_change and not self.print_ir_after
        )
        if asked and (changed or not self.print_ir_after_change):
            self._print("after", pass_, new)

    def failed(self, pass_: Pass[Any, Any], program: Program) -> None:
        """Take note that a pass has failed on a program."""
        if self.print_ir_after_failure:
            self._print("after failure of", pass_, program)

    def finish(self, steps: Sequence[Step]) -> None:
        """Show the tables."""
        if self.timing and steps:
            self.say("execution time", timing_text(steps))
        if self.statistics and steps:
            self.say("pass statistics", statistics_text(steps))

    def _print(self, when: Literal["before", "after", "after failure of"], pass_: Pass[Any, Any],
               program: Program) -> None:  # fmt: skip
        self.say(f"{when} {pass_.name}", program.text())


class Stages:
    """Wall time by stage: `with clock("plan"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> Stages:
        self._open.append((stage, time.perf_counter()))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        stage, begin = self._open.pop()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


def timing_table(steps: Sequence[Step]) -> Table:
    """Return wall seconds per pass and stage, and nodes before and after."""
    from rich.table import Table

    stages = [stage for stage in STAGES if any(stage in step.seconds for step in steps)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass")
    for column in (*stages, "total s", "share", "nodes"):
        table.add_column(column, justify="right")
    whole = sum(sum(step.seconds.values()) for step in steps)
    for step in steps:
        taken = sum(step.seconds.values())
        cells = [f"{step.seconds.get(stage, 0.0):.3f}" for stage in stages]
        share = f"{100 * taken / whole:.0f} %" if whole else ""
        nodes = f"{step.receipt.nodes[0]} -> {step.receipt.nodes[1]}"
        name = f"{step.pass_.name} (from checkpoint)" if step.resumed else step.pass_.name
        table.add_row(name, *cells, f"{taken:.3f}", share, nodes)
    sums = [f"{sum(step.seconds.get(stage, 0.0) for step in steps):.3f}" for stage in stages]
    table.add_row("total", *sums, f"{whole:.3f}", "", "", style="bold")
    return table


def timing_text(steps: Sequence[Step]) -> str:
    """Return the timing table as text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(timing_table(steps))
    return out.getvalue().rstrip()


def statistics_text(steps: Sequence[Step]) -> str:
    """Return counters per pass, one to a line."""
    lines = []
    for step in steps:
        receipt = step.receipt
        counts = {
            "candidates": receipt.candidates,
            "changed": len(receipt.changed),
            "skipped": len(receipt.skipped),
            **receipt.statistics,
        }
        lines.append(step.pass_.name)
        lines += [f"  {count:>10} {name}" for name, count in counts.items()]
    return "\n".join(lines)


def _asks(which: Which, pass_: Pass[Any, Any]) -> bool:
    return which if isinstance(which, bool) else pass_.name in _names(which)


def _names(which: Which) -> tuple[str, ...]:
    if isinstance(which, bool):
        return ()
    return (which,) if isinstance(which, str) else tuple(which)
