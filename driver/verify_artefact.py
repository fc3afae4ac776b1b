"""Check a saved engine against the model it claims to come from, trusting no stored number.

Four questions, each answered by computing:

    numbers    artefact and model on the same inputs, beside fp64: as the recipe promises?
    stored     is that what the artefact's certificate says, for outputs, blocks and costs?
    passes     do the passes, with the stored plans, turn the model into this very program?
    promises   does each of them, run again, keep its promise?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends.artefact import load
from ..ir.errors import BlockwrightError, OptionError
from ..ir.plain import fit, plain
from ..ir.program import Program
from ..passes.base import Pass, Promise
from .casefile import graph_hash, inputs_hash
from .certify import Certificate, hold, promise_of
from .manager import run_passes
from .numerics import Inputs
from .recipe import resolve
from .whole import Whole, measure

TOLERANCE = 0.05  # relative; two machines round differently, and quantization amplifies that
ROUNDING = 64 * 2.0**-24  # errors below this are noise of fp32


@dataclass(frozen=True)
class Disagreement:
    """Something that is not as claimed.

    Attributes:
        what: In one sentence.
        where: Output, block or tensor.
    """

    what: str
    where: str


@dataclass(frozen=True)
class Verification:
    """What came of checking an artefact.

    Attributes:
        certificate: As computed now.
        disagreements: What is not as claimed, the first block in execution order first.
        notes: What could not be checked, and why.
    """

    certificate: Certificate
    disagreements: tuple[Disagreement, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as claimed."""
        return not self.disagreements

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ok": self.ok, **plain(self)}


@dataclass
class _Findings:
    disagreements: list[Disagreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, where: str) -> None:
        self.disagreements.append(Disagreement(what, where))


def verify_artefact(path: Path, program: Program, inputs: Sequence[Inputs]) -> Verification:
    """Check an artefact against the captured model.

    Args:
        path: The artefact.
        program: The model it is said to come from, freshly captured.
        inputs: Flat inputs; the stored numbers are compared when they are those of the compile.

    Raises:
        ArtefactError: The artefact is damaged.
        OptionError: It is not called like the model.
    """
    engine = load(path, backend="eager")
    new, record = engine.program, engine.record
    _require_same_call(program, new)
    found = _Findings()
    whole = measure(program, new, inputs)
    passes = _passes(record, found)
    _check_stored(record, whole, inputs, found)
    _check_numbers(record, passes, whole, found)
    if passes is not None:
        _check_passes(record, passes, program, new, inputs, found)
    return Verification(whole.certificate, tuple(found.disagreements), tuple(found.notes))


def _check_numbers(
    record: Mapping[str, Any],
    passes: Sequence[Pass[Any, Any]] | None,
    whole: Whole,
    found: _Findings,
) -> None:
    """Hold the artefact to what its passes promise together."""
    if passes is not None:
        promise = promise_of(passes)
    else:
        stored = [Promise(step["promise"]) for step in record.get("steps", ())]
        promise = max(stored, key=list(Promise).index, default=Promise.EXACT)
    try:
        hold("the artefact", promise, whole.verdicts)
    except BlockwrightError as error:
        found.add(error.what, error.where or _worst_block(whole.certificate))


def _check_stored(
    record: Mapping[str, Any], whole: Whole, inputs: Sequence[Inputs], found: _Findings
) -> None:
    """Compare the stored certificate with what was measured now."""
    if record.get("inputs") != inputs_hash(inputs):
        found.notes.append(
            "stored numbers were not compared: the artefact was certified on other inputs; give the"
            " same --input, --seed and --calibration."
        )
        return
    try:
        stored = fit(record.get("certificate"), Certificate | None)
    except TypeError:
        found.add("the stored certificate is malformed", "certificate.json")
        return
    if stored is None:
        if record.get("steps"):
            found.add("there is no certificate of the whole recipe", "certificate.json")
        return
    _compare_blocks(stored, whole.certificate, found)
    for name, now in whole.certificate.outputs.items():
        before = stored.outputs.get(name)
        if before is None or not _agree(before.difference, now.difference):
            said = "nothing" if before is None else f"{before.difference:.3g}"
            found.add(f"moved by {now.difference:.3g}; the certificate says {said}", name)
    for name, count in whole.certificate.costs.items():
        known = stored.costs.get(name)
        if known is None or known.measured != count.measured:
            said = "nothing" if known is None else f"{known.measured:,}"
            found.add(f"{count.measured:,} {name}; the certificate says {said}", "costs")


def _compare_blocks(stored: Certificate, now: Certificate, found: _Findings) -> None:
    for name, error in now.blocks.items():
        before = stored.blocks.get(name)
        if before is None or not _agree(before, error):
            said = "nothing" if before is None else f"{before:.3g}"
            found.add(f"the block moved by {error:.3g}; the certificate says {said}", name)


def _check_passes(
    record: Mapping[str, Any],
    passes: Sequence[Pass[Any, Any]],
    program: Program,
    new: Program,
    inputs: Sequence[Inputs],
    found: _Findings,
) -> None:
    """Run the passes with the stored plans, and compare what they make with what is there."""
    plans = [step["plan"] for step in record.get("steps", ())]
    if len(plans) != len(passes):
        found.add("the stored plan and recipe do not belong together", "plan.json")
        return
    try:
        made, _ = run_passes(program, passes, inputs, plans=plans)
    except BlockwrightError as error:
        found.add(error.what, error.where or "the passes")
        return
    place = _first_difference(made, new)
    if place:
        found.add("not what the passes make of the model", place)


def _first_difference(expected: Program, found: Program) -> str | None:
    """Return the first block, or tensor outside blocks, in which two programs differ."""
    for name in expected.instances:
        ours, theirs = expected.instances[name], found.instances.get(name)
        if theirs is None or ours.weights.keys() != theirs.weights.keys():
            return name
        for slot, weight in ours.weights.items():
            if not _same(expected.tensors[weight], found.tensors.get(theirs.weights[slot])):
                return name
    for name, tensor in expected.tensors.items():
        if not _same(tensor, found.tensors.get(name)):
            return name
    return None if graph_hash(expected) == graph_hash(found) else "the graph"


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _passes(record: Mapping[str, Any], found: _Findings) -> list[Pass[Any, Any]] | None:
    """Return the passes of the recipe; None when one is not installed here."""
    try:
        return resolve(str(record.get("recipe", "")))
    except OptionError as error:
        found.notes.append(f"the passes were not run again: {error.what}")
        return None


def _require_same_call(program: Program, new: Program) -> None:
    ours = [(spec.name, spec.dtype, spec.shape) for spec in program.signature.inputs]
    theirs = [(spec.name, spec.dtype, spec.shape) for spec in new.signature.inputs]
    if ours != theirs:
        raise OptionError(
            "the artefact is called with other arguments than the model.",
            where=f"{[name for name, *_ in theirs]} against {[name for name, *_ in ours]}",
            remedy="give --input and --dynamic as when it was compiled.",
        )


def _worst_block(certificate: Certificate) -> str:
    return max(certificate.blocks, key=certificate.blocks.__getitem__, default="the outputs")


def _agree(stored: float, now: float) -> bool:
    return abs(stored - now) <= TOLERANCE * max(stored, now) + ROUNDING
