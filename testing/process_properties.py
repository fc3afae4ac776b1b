"""How a pass behaves beside its result: failures, files, cost, options, company."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ..driver.manager import run_passes
from ..driver.options import options_of
from ..driver.recipe import resolve
from ..ir.branches import choices
from ..ir.errors import BlockwrightError, NoMatchError, OptionError
from ..ir.facts import objection
from ..ir.serialize import from_json, to_json
from ..ir.verify import verify
from ..passes import PASSES
from ..passes.base import Promise
from .case import AnyPass, Case, apply, built, eager_runs, outputs, planned, run_untrained
from .configs import ModelConfig
from .counting import counted
from .snapshot import snapshot
from .tolerance import t0, t1

ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError)


def reports_when_nothing_matches(case: Case) -> None:
    """Ask for an error where nothing was changed, unless the caller accepts it.

    A model that is not what the pass requires is refused before that.
    """
    for program in (case.program, built(ModelConfig())):
        if any(objection(program, fact) for fact in case.pass_.requires):
            with pytest.raises(OptionError, match=case.pass_.name):
                run_untrained(program, case.pass_)
        elif not planned(case.pass_, program).decisions:
            with pytest.raises(NoMatchError, match=case.pass_.name):
                run_untrained(program, replace(case.pass_, allow_no_match=False))
            same, _ = run_untrained(program, replace(case.pass_, allow_no_match=True))
            assert same is program


def fails_without_a_trace(case: Case) -> None:
    """Ask that an error at any replacement leaves everything as it was (B1, B5)."""
    if case.applied is None:
        return
    program, count = case.program, len(case.applied[1].plan.decisions)
    before = snapshot(program)
    for index in sorted({0, count // 2, count - 1}):
        error = ERRORS[index % len(ERRORS)]
        with pytest.raises(error, match="injected"):
            run_untrained(program, failing(case.pass_, index, error))
        assert snapshot(program) == before, f"an error at replacement {index} left something"
    again = apply(case.pass_, program)
    assert again is not None
    assert snapshot(again[0]) == snapshot(case.applied[0]), "after an error the result is another"


def survives_saving(case: Case) -> None:
    """Ask that what is read back is what was written, and is written alike (R1, R2)."""
    if case.applied is None:
        return
    new = case.applied[0]
    written = json.dumps(to_json(new), sort_keys=True)
    read = from_json(json.loads(written), dict(new.tensors))
    assert json.dumps(to_json(read), sort_keys=True) == written
    assert read.text() == new.text()
    t0(outputs(read, case.flat), outputs(new, case.flat))


def costs_what_it_says(case: Case) -> None:
    """Ask that predicted cost is what a run takes, at every size (N1, N2)."""
    new = case.program if case.applied is None else case.applied[0]
    stored = {t.untyped_storage().data_ptr(): t for t in new.tensors.values()}
    assert new.cost().weight_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    for batch, seq in ((None, None), (1, 1), (3, 5)):
        sizes = {"batch": batch or 0, "seq": seq or 0}
        known = {name: sizes[name] for name in case.config.dynamic if sizes[name]}
        inputs = case.sized(known.get("batch"), known.get("seq"))
        predicted, measured = new.cost(known).by_kind, counted(new, inputs)
        products = sum(n for kind, n in predicted.items() if kind != "elementwise")
        found = products, predicted.get("elementwise", 0)
        counts = measured.products, measured.elementwise
        if any(choices(graph) for graph in new.graphs.values()):
            assert sum(found) >= sum(counts), "the dearest branches cost less than a run"
        else:
            assert found == counts, f"predicted {predicted}, measured {measured}"


def refuses_bad_options(case: Case) -> None:
    """Ask that options out of range are refused by name, and nothing fails in another way."""
    kind = type(case.pass_)
    for options in case.subject.refused:
        with pytest.raises(OptionError, match=case.pass_.name):
            replace(case.pass_, **options)
    for option in options_of(kind).values():
        for value in probes(option.hint):
            said = ""
            try:
                apply(replace(case.pass_, **{option.name: value}), case.program)
            except BlockwrightError as error:
                said = str(error)
            assert not said or case.pass_.name in said, f"{said} does not say which pass"


def reads_as_it_prints(case: Case) -> None:
    """Ask that a recipe of the pass's text is the pass."""
    registered = {kind.name: kind for kind in PASSES}
    if registered.get(case.pass_.name) is type(case.pass_):
        assert resolve(str(case.pass_)) == [case.pass_]


def goes_with_other_passes(case: Case) -> None:
    """Ask that before and after every registered pass it works, or is refused with a reason."""
    ours = replace(case.pass_, allow_no_match=True)
    for kind in PASSES:
        if any(option.required for option in options_of(kind).values()):
            continue
        other = kind(allow_no_match=True)
        for order in ((ours, other), (other, ours)):
            remedy: str | None = "none needed"
            new = None
            try:
                new, _ = run_passes(case.program, order, [case.flat])
            except OptionError as error:
                remedy = error.remedy
            assert remedy, "refused without saying what to do"
            if new is None:
                continue
            verify(new)
            if all(pass_.promised() is Promise.EXACT for pass_ in order):
                truth = outputs(case.program, case.flat, torch.float64)
                t1(outputs(new, case.flat), eager_runs(case.program, case.flat), truth)


def failing(pass_: AnyPass, at: int, error: type[BaseException]) -> AnyPass:
    """Return a pass that does the same and fails at a replacement."""
    kind, done = type(pass_), iter(range(10**9))

    def fail(self: AnyPass, region: Any, decision: Any) -> Any:
        if next(done) == at:
            raise error("injected")
        return kind.replace(self, region, decision)

    broken: Any = dataclasses.dataclass(frozen=True, kw_only=True)(
        type(kind.__name__, (kind,), {"replace": fail, "__module__": kind.__module__})
    )
    return broken(**{f.name: getattr(pass_, f.name) for f in dataclasses.fields(pass_)})


def probes(hint: Any) -> Iterator[Any]:
    """Yield values at and beyond the edges of an option's type."""
    if hint is int or hint == int | None:
        yield from (-1, 0, 1, 3, 10**9)
    elif hint is float or hint == float | None:
        yield from (-1.0, 0.0, 1.0, float("inf"), float("nan"))
    elif hint is bool:
        yield from (False, True)
    elif hint is str or hint == str | None:
        yield from ("", "nonsense")
    elif hint == tuple[str, ...]:
        yield from ((), ("nothing.is.called.this",), ("*",))
