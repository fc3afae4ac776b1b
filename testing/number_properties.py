"""What a pass may do to the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.program import Program
from ..ir.run import run
from ..passes.base import Promise
from .case import Case, apply, eager_runs, outputs
from .tolerance import MANTISSA, t0, t1, t2, tx

SIZES = ((1, 1), (4, 2), (3, 7))
"""Batch and length that programs with dynamic dimensions are run at beside the example."""


def keeps_its_promise(case: Case) -> None:
    """Ask exact passes to agree within rounding (T1), bounded ones within their bound (T2)."""
    if case.applied is None:
        return
    program, new, inputs = case.program, case.applied[0], case.flat
    if case.pass_.promised() is Promise.EXACT:
        truth = outputs(program, inputs, torch.float64)
        t1(outputs(new, inputs), eager_runs(program, inputs), truth)
    if case.pass_.promised() is Promise.BOUNDED:
        _, step = case.applied
        seen = _inputs_of_regions(case)
        for region in case.pass_.regions(program):
            if region.label in step.plan.decisions and region.label in seen:
                module = case.pass_.replace(region, step.plan.decisions[region.label]).double()
                values = seen[region.label]
                bound = case.pass_.bound(region, module, *values)
                if bound is not None:
                    exact = torch.as_tensor(region.replay(values, torch.float64)[0])
                    found = module(*values)
                    used = t2(found - exact, bound, exact.abs().max(), 2.0**-24)
                    assert used <= 1, f"{region.label} moved {used:.3g} times as far as promised"


def is_exact_on_integers(case: Case) -> None:
    """Ask for equal bits where every order of summation gives the same (TX)."""
    exact = case.subject.exact
    found = apply(exact, case.program) if exact is not None else None
    if found is None:
        return
    largest = largest_sum(case.program, case.flat)
    tx(outputs(found[0], case.flat), outputs(case.program, case.flat), largest)
    if largest < 2.0 ** MANTISSA[torch.float32]:
        single = case.retyped("float32")
        other = apply(exact, single.program) if exact is not None else None
        assert other is not None, "matches in fp64 and not in fp32"
        tx(outputs(other[0], single.flat), outputs(single.program, single.flat), largest)


def keeps_rows_apart(case: Case) -> None:
    """Ask that a row of a batch does not depend on the others, or on its place (S6, S7)."""
    exact = case.subject.exact
    found = apply(exact, case.program) if exact is not None else None
    if found is None or "batch" not in case.config.dynamic:
        return
    new, inputs = found[0], case.sized(batch=4)
    together = outputs(new, inputs)[0]
    order = torch.tensor([2, 0, 3, 1])
    t0([outputs(new, [value[order] for value in inputs])[0]], [together[order]])
    for row in range(4):
        alone = outputs(new, [value[row : row + 1] for value in inputs])[0]
        t0([alone], [together[row : row + 1]], f"row {row}")


def keeps_nan_in_its_row(case: Case) -> None:
    """Ask that NaN in one row of the batch is seen in no other (S11)."""
    if case.applied is None or case.config.vocab:
        return
    x, *rest = case.flat
    broken = x.clone()
    broken[0] = float("nan")
    new = case.applied[0]
    t0(
        [outputs(new, [broken, *rest])[0][1:]],
        [outputs(new, [x, *rest])[0][1:]],
        "rows without NaN, output",
    )


def works_at_other_sizes(case: Case) -> None:
    """Ask for agreement at sizes that were not in the example (I6, S8)."""
    if case.applied is None:
        return
    program, new = case.program, case.applied[0]
    for batch, seq in SIZES:
        inputs = case.sized(
            batch if "batch" in case.config.dynamic else None,
            seq if "seq" in case.config.dynamic else None,
        )
        found, before = outputs(new, inputs), outputs(program, inputs)
        assert [v.shape for v in found] == [v.shape for v in before]
        assert [v.dtype for v in found] == [v.dtype for v in before]
        if case.pass_.promised() is Promise.EXACT:
            t1(found, eager_runs(program, inputs), outputs(program, inputs, torch.float64))


def largest_sum(program: Program, inputs: list[Tensor]) -> float:
    """Return the largest sum of absolute terms that any op of the program can meet."""
    positive = program.with_(tensors={name: t.abs() for name, t in program.tensors.items()})
    worst = 0.0

    def see(instance: str | None, node: object, value: object) -> None:
        nonlocal worst
        if isinstance(value, Tensor) and value.numel() and value.is_floating_point():
            worst = max(worst, float(value.abs().max()))

    run(
        positive,
        [v if v.dtype == torch.bool else v.abs() for v in inputs],
        dtype=torch.float64,
        on_node=see,
    )
    return worst


def _inputs_of_regions(case: Case) -> dict[str, list[Tensor]]:
    """Return what each region of the pass reads, in fp64, by its label."""
    wanted = {region.label: region for region in case.pass_.regions(case.program)}
    values: dict[object, Tensor] = {}

    def see(instance: str | None, node: object, value: Tensor) -> None:
        values[instance, node] = value

    run(case.program, case.flat, dtype=torch.float64, on_node=see)
    return {
        label: [values[region.instance, node] for node in region.inputs]
        for label, region in wanted.items()
    }
