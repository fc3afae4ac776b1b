"""Put known bugs into blockwright, one at a time, and see whether the tests notice.

    python tests/mutants/run.py [--shard 1/3] [--minutes 10] [--jobs 2] [--only NAME] [--write]

Each mutant of `mutants.toml` replaces one snippet of one file. The working tree stays as it is: a
forked process that has not imported blockwright yet gets the changed source from an import hook,
and runs the tests meant to see it. First, the tests must pass without any mutant.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import hypothesis
import pytest
import torch
from hook import ROOT, Change, install

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "mutants.md"
GOAL = 0.95  # of the mutants
LIMIT_S = 180.0  # wall-clock time of one mutant: many times what the slowest takes
# What blockwright imports, imported once for all mutants; they start in 0.1 s instead of 10.
SHARED = (
    "torch._dynamo", "torch.onnx", "torch.fx.experimental.proxy_tensor",
    "torch.ao.quantization.fx._decomposed", "jaxtyping", "jinja2", "networkx", "onnx",
    "onnx_ir", "onnxruntime", "onnxscript", "rich.table", "safetensors.torch", "sympy", "typer",
)  # fmt: skip
OPTIONS = (
    "-x", "-q", "--tb=no", "-o", "timeout=0", "-m", "not slow and not acceptance and not gpu",
    "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio", "-p", "no:jaxtyping",
    "--hypothesis-profile", "mutants",
)  # fmt: skip
KILLED, SURVIVED, CRASHED, LATE = "killed", "SURVIVED", "killed: crash", "killed: out of time"
BROKEN = "BROKEN"  # the run says nothing about the tests
NOT_RUN = "not run"


@dataclass(frozen=True)
class Mutant:
    """A known bug.

    Attributes:
        name: What it is called.
        bug: What is wrong, in words.
        change: The file and the snippet in it.
        tests: pytest node ids of the tests meant to see it.
        survives: Why no test sees it, for one that is known to survive; else empty.
    """

    name: str
    bug: str
    change: Change
    tests: tuple[str, ...]
    survives: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: a verdict, the test that saw it, and the processor time it took."""

    verdict: str
    by: str = ""
    cpu_s: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether the tests noticed."""
        return self.verdict in (KILLED, CRASHED, LATE)


class BrokenRun(Exception):
    """The run says nothing about the tests: a stale mutant, or tests that fail without one."""


def read_mutants(path: Path = HERE / "mutants.toml") -> list[Mutant]:
    """Return the mutants of the table."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [
        Mutant(
            name=table["name"],
            bug=table["bug"],
            change=Change(table["file"], table["old"], table["new"]),
            tests=tuple(table["tests"]),
            survives=table.get("survives", ""),
        )
        for table in tables
    ]


def warm_up() -> None:
    """Import, once for all forks, what blockwright imports; an export imports the most by far."""
    for name in SHARED:
        importlib.import_module(name)
    rows = {0: torch.export.Dim("rows", min=1, max=8)}
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), dynamic_shapes=(rows,))
    found_is_enough = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutants", database=None, deadline=None, derandomize=True, phases=found_is_enough
    )
    gc.freeze()


def part(mutants: Sequence[Mutant], shard: str) -> list[Mutant]:
    """Return every n-th mutant from the k-th on, for a shard `k/n`."""
    index, count = map(int, shard.split("/"))
    return list(mutants[index - 1 :: count])


def check_baseline(mutants: Sequence[Mutant]) -> None:
    """Require that the tests pass when nothing is changed.

    Raises:
        BrokenRun: They do not.
    """
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    trial = Trial(tests, None)
    outcome = trial.outcome(20 * LIMIT_S)
    if outcome.verdict != SURVIVED:
        raise BrokenRun(f"without a mutant, the tests fail: {outcome.by or outcome.verdict}")


def run(mutants: Sequence[Mutant], jobs: int, deadline: float) -> Iterator[tuple[Mutant, Outcome]]:
    """Try some mutants at a time, and yield what became of each; none starts after the deadline."""
    pending, trials = list(mutants), dict[Mutant, Trial]()
    while pending or trials:
        while pending and len(trials) < jobs and time.monotonic() < deadline:
            mutant = pending.pop(0)
            trials[mutant] = Trial(mutant.tests, mutant.change)
        if not trials:
            break
        wait([trial.receiver for trial in trials.values()], timeout=1)
        for mutant in [m for m, trial in trials.items() if trial.over]:
            yield mutant, trials.pop(mutant).outcome()
    yield from ((mutant, Outcome(NOT_RUN)) for mutant in pending)


class Trial:
    """A forked process that runs tests on changed sources."""

    def __init__(self, tests: Sequence[str], change: Change | None) -> None:
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self._end = time.monotonic() + LIMIT_S
        self._process: BaseProcess = context.Process(target=_try, args=(tests, change, sender))
        self._process.start()
        sender.close()

    @property
    def over(self) -> bool:
        """Whether there is an outcome, be it that time is up."""
        return self.receiver.poll() or time.monotonic() > self._end

    def outcome(self, patience_s: float = 0.0) -> Outcome:
        """Return what the tests said; stop them when they have said nothing."""
        try:
            if self.receiver.poll(patience_s):
                return _judge(*self.receiver.recv())
            return Outcome(LATE)
        except EOFError:
            return Outcome(CRASHED)
        finally:
            if self._process.is_alive() and not self.receiver.closed:
                self._process.join(5)
            self._process.kill()
            self._process.join()
            self.receiver.close()


def _judge(code: int, by: str, cpu_s: float) -> Outcome:
    if code == pytest.ExitCode.OK:
        return Outcome(SURVIVED, cpu_s=cpu_s)
    if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED) and by:
        return Outcome(KILLED, by, cpu_s)
    return Outcome(BROKEN, by or pytest.ExitCode(code).name, cpu_s)


class FirstFailure:
    """A pytest plugin that remembers which test failed first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"{report.nodeid} (import)"


def _try(tests: Sequence[str], change: Change | None, sender: Connection) -> None:
    """Run in the fork: change, test, tell."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    first = FirstFailure()
    try:
        loader = install(change) if change else None
        code = int(pytest.main([*OPTIONS, *tests], plugins=[first]))
        if loader is not None and not loader.used:
            raise BrokenRun("no test imports the changed file")
    except Exception as error:  # of the runner: errors of tests stay within pytest
        code, first.name = int(pytest.ExitCode.INTERNAL_ERROR), str(error)
    sender.send((code, first.name, time.process_time()))
    sender.close()
    os._exit(0)


def page(outcomes: Sequence[tuple[Mutant, Outcome]]) -> str:
    """Return the table of a full run as Markdown."""
    lines = [
        "# Mutants",
        "",
        "Known bugs that were put into blockwright, and the test that noticed each one first.",
        "Written by `make mutants`; the bugs are in `tests/mutants/mutants.toml`.",
        "",
        f"{summary(outcomes)}",
        "",
        "| mutant | file | bug | outcome | noticed by |",
        "|---|---|---|---|---|",
    ]
    for mutant, outcome in outcomes:
        by = f"`{outcome.by.removeprefix('tests/')}`" if outcome.by else mutant.survives
        row = (mutant.name, f"`{mutant.change.file}`", mutant.bug, outcome.verdict, by)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[tuple[Mutant, Outcome]]) -> str:
    """Say how many were killed, and name the others."""
    killed = sum(outcome.killed for _, outcome in outcomes)
    text = f"{killed} of {len(outcomes)} mutants killed ({killed / max(len(outcomes), 1):.1%})"
    missed = [mutant.name for mutant, outcome in outcomes if outcome.verdict == SURVIVED]
    return f"{text}; survivors: {', '.join(missed) or 'none'}."


def main() -> int:
    """Run what the command line asks for; 0 when enough mutants are killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shard", default="1/1", help="every n-th mutant from the k-th: k/n")
    parser.add_argument("--minutes", type=float, default=60.0, help="start none after this time")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", nargs="*", default=[], help="names of mutants")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md when all ran")
    asked = parser.parse_args()
    chosen = [m for m in part(read_mutants(), asked.shard) if m.name in (asked.only or [m.name])]
    deadline = time.monotonic() + 60 * asked.minutes
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    for mutant in chosen:
        mutant.change.apply()  # stale ones are found before any time is spent
    warm_up()
    if not asked.no_baseline:
        check_baseline(chosen)
    outcomes: dict[Mutant, Outcome] = {}
    for mutant, outcome in run(chosen, asked.jobs, deadline):
        outcomes[mutant] = outcome
        line = f"{outcome.verdict:<21} {outcome.cpu_s:5.1f} s  {mutant.name:<40} {outcome.by}"
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    ran = [(m, outcomes[m]) for m in chosen if outcomes[m].verdict != NOT_RUN]
    sys.stdout.write(f"{summary(ran)} {len(chosen) - len(ran)} not run.\n")
    if asked.write and len(ran) == len(read_mutants()):
        PAGE.write_text(page(ran), encoding="utf-8")
        sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")
    sound = all(outcome.verdict != BROKEN for _, outcome in ran)
    return 0 if sound and sum(o.killed for _, o in ran) >= GOAL * len(ran) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenRun as error:
        sys.exit(f"broken run: {error}")
