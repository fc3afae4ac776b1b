"""Measure what a pass did to the numbers and sizes, and hold it to its promise.

Three runs on the same inputs: the old program, the new program, and the old program in fp64, whose
distance from the old one says how much rounding explains. An exact pass may not exceed a small
multiple of it. `driver.numerics` has the rule, `driver.bounds` that of bounded passes,
`driver.account` the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import VerifyError
from ..ir.plain import plain
from ..ir.program import Program
from ..ir.run import run
from ..passes.base import Pass, Promise
from .account import Count, Meter
from .bounds import BoundCheck
from .numerics import Inputs, OutputError, Verdict, judge, relative, within_rounding

__all__ = ["Certificate", "Inputs", "Observed", "certify", "relative", "within_rounding"]
REFERENCE_LIMIT_BYTES = 2 << 30  # above this many weight bytes there is no fp64 reference
Blocks = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Certificate:
    """What was measured of one pass, or of a whole recipe.

    Attributes:
        outputs: Error by output path.
        blocks: Relative difference of the outputs of each block instance, new from old.
        bound: The check of a bounded pass.
        inputs: Number of input sets measured on.
        blocks_exact: Distance of each block instance from fp64, old and new; empty without a
            reference.
        costs: Parameters, activated parameters, bytes and FLOPs, predicted and measured, of one
            call on the first input set.
    """

    outputs: dict[str, OutputError]
    blocks: dict[str, float]
    bound: BoundCheck | None
    inputs: int
    blocks_exact: dict[str, tuple[float, float]] = field(default_factory=dict)
    costs: dict[str, Count] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return plain(self)


@dataclass(frozen=True)
class Observed:
    """Outputs and block outputs of a program on several input sets, and what the first counted."""

    outputs: list[list[Tensor]]
    blocks: list[dict[str, list[Tensor]]]
    counts: dict[str, int]


@dataclass(frozen=True)
class Reference:
    """Outputs in fp64, and how far the blocks of old and new program are from theirs."""

    outputs: list[list[Tensor]]
    blocks: dict[str, tuple[float, float]]


def observe(program: Program, inputs: Sequence[Inputs]) -> Observed:
    """Run a program and keep its outputs and those of its blocks."""
    outputs: list[list[Tensor]] = []
    blocks: list[dict[str, list[Tensor]]] = []
    meter = Meter(program)
    for index, flat in enumerate(inputs):
        seen: dict[str, list[Tensor]] = {}
        saw = None if index else meter.saw
        outputs.append(run(program, flat, on_block=_keep(seen), on_node=saw))
        blocks.append(seen)
    return Observed(outputs, blocks, meter.counts())


def refer(
    program: Program, inputs: Sequence[Inputs], old: Observed, new: Observed
) -> Reference | None:
    """Run the old program in fp64 beside what was observed; None when that takes too much memory.

    Block outputs are compared as they appear and not kept.
    """
    size = sum(t.numel() * t.element_size() for t in program.tensors.values())
    if size > REFERENCE_LIMIT_BYTES:
        return None
    outputs: list[list[Tensor]] = []
    blocks: dict[str, tuple[float, float]] = {}
    for flat, before, after in zip(inputs, old.blocks, new.blocks, strict=True):

        def on_block(
            name: str, values: Sequence[Any], before: Blocks = before, after: Blocks = after
        ) -> None:
            if name in before and name in after:
                low, high = blocks.get(name, (0.0, 0.0))
                known = values[: len(before[name])]  # state that a pass declared comes behind
                found = _apart(before[name], known), _apart(after[name], known)
                blocks[name] = max(low, found[0]), max(high, found[1])

        outputs.append(run(program, flat, dtype=torch.float64, on_block=on_block))
    return Reference(outputs, blocks)


def certify(
    program: Program,
    old: Observed,
    new: Observed,
    exact: Reference | None,
    bound: BoundCheck | None,
    costs: Mapping[str, Count],
) -> tuple[Certificate, dict[str, Verdict]]:
    """Compare two programs.

    Returns:
        What is kept, and the verdict on each output for `hold`.
    """
    # State that a pass has declared was not there before: there is nothing to compare it with.
    names = output_names(program)[: len(old.outputs[0]) if old.outputs else None]
    verdicts = judge(old.outputs, new.outputs, exact.outputs if exact else None, names)
    certificate = Certificate(
        outputs={name: verdict.error for name, verdict in verdicts.items()},
        blocks=_block_errors(old, new),
        bound=bound,
        inputs=len(old.outputs),
        blocks_exact=dict(exact.blocks) if exact else {},
        costs=dict(costs),
    )
    return certificate, verdicts


def hold(
    by: str, promise: Promise, verdicts: Mapping[str, Verdict], bound: BoundCheck | None = None
) -> None:
    """Check a promise.

    Raises:
        VerifyError: An exact pass moved the numbers further than reassociation explains, a
            bounded one further than its bound, or NaN appeared.
    """
    for name, verdict in verdicts.items():
        if not verdict.finite:
            raise VerifyError(
                f"{by} made output {name!r} infinite or NaN.",
                remedy="exclude blocks until it stays finite; the certificate of each pass alone"
                " shows where it begins.",
            )
        if promise is Promise.EXACT and not verdict.rounding:
            raise VerifyError(
                f"{by} promises exact results and moved output {name!r} by"
                f" {verdict.error.difference:.3g} of its norm.",
                remedy="run the pass alone with print_ir_after to see what it changed, and"
                " report it.",
            )
    if bound is not None and bound.worst_ratio > 1:
        raise VerifyError(
            f"{by} moved an output {bound.worst_ratio:.3g} times as far as it promises.",
            where=bound.worst_at,
            remedy=f"leave it out with exclude={bound.worst_at!r}, and report it.",
        )


def promise_of(passes: Sequence[Pass[Any, Any]]) -> Promise:
    """Return what a list of passes promises together: as little as the weakest of them."""
    order = list(Promise)
    return max((pass_.promised() for pass_ in passes), key=order.index, default=Promise.EXACT)


def output_names(program: Program) -> list[str]:
    """Name the flat outputs of a program: paths of the result, then state."""
    paths = [path for index, path in enumerate(program.signature.outputs.paths())
             if index not in program.signature.constants]  # fmt: skip
    return [path or "output" for path in paths] + [slot.name for slot in program.state]


def _block_errors(old: Observed, new: Observed) -> dict[str, float]:
    errors: dict[str, float] = {}
    for before, after in zip(old.blocks, new.blocks, strict=True):
        for name in before.keys() & after.keys():
            errors[name] = max(errors.get(name, 0.0), _apart(after[name], before[name]))
    return {name: errors[name] for name in (old.blocks[0] if old.blocks else ()) if name in errors}


def _apart(values: Sequence[Tensor], truth: Sequence[Any]) -> float:
    """Return the largest relative distance among the values of a block."""
    tensors = [value for value in truth if isinstance(value, Tensor)]
    pairs = zip(values, tensors, strict=False)
    return max((relative(a, b) for a, b in pairs if a.is_floating_point()), default=0.0)


def _keep(seen: dict[str, list[Tensor]]) -> Any:
    def on_block(name: str, outputs: Sequence[Any]) -> None:
        seen[name] = [value for value in outputs if isinstance(value, Tensor)]

    return on_block
