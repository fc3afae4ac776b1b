"""Find the first node of a foreign graph that computes something the model does not.

Values of the two graphs are matched by their numbers. A value that matches nothing is innocent as
long as something computed from it matches: graphs spell the same thing in different steps. The
first value, in the order of execution, for which that is not so was made by the node at fault, and
the values that node reads say which part of the model it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir.errors import LoweringError
from ..ir.program import Program
from ..ir.recognize import Attention, FeedForward, Norm
from ..ir.regions import Region, regions
from .fingerprint import Fingerprint, Index, fingerprint
from .foreign import Step, Trace
from .hints import hints_for, kind_of
from .landmarks import Known, index_of
from .numerics import within_rounding

_LITERAL = 8  # elements of a constant that is shown as a number


@dataclass(frozen=True)
class Suspect:
    """The first node that goes wrong.

    Attributes:
        node: Its name.
        op: Its operator.
        domain: Of the operator; empty for the standard one.
        attributes: Literals it was given, small constants it reads among them.
        reads: What each value it reads is in the model, in words.
        region: The part of the model it stands for; empty when unknown.
        constants: What is known of that part.
        hints: Where attributes and constants contradict each other.
        also: Further nodes at which something goes wrong that does not follow from this.
    """

    node: str
    op: str
    domain: str
    attributes: Mapping[str, Any]
    reads: Mapping[str, str]
    region: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        op = f"{self.domain}.{self.op}" if self.domain else self.op
        place = f", {self.region}" if self.region else ""
        return "; ".join([f"{self.node} ({op}){place}", *self.hints])


def locate(
    program: Program,
    inputs: Sequence[Tensor],
    trace: Trace,
    original: Trace | None = None,
) -> Suspect | None:
    """Name the first node of a run that goes wrong; None when every value leads to a known one.

    Args:
        program: The captured model, at the sizes of the inputs.
        inputs: Flat inputs of the model.
        trace: The foreign graph on the same inputs.
        original: The foreign graph before it was rewritten, taken to be right: its values are
            known by name too.
    """
    index = index_of(program, inputs)
    evidence = _Evidence(trace, index, original)
    roots = evidence.roots()
    if not roots:
        return None
    step = evidence.cause(roots[0])
    region = _nearest_region(program, evidence, step)
    literals = dict(step.attributes) | evidence.literals(step)
    return Suspect(
        node=step.name,
        op=step.op,
        domain=step.domain,
        attributes=literals,
        reads={name: evidence.words(name) for name in step.reads if name in trace.values},
        region=f"{region.kind.replace('_', '-')} {region.label}" if region else "",
        constants=_constants(region) if region else {},
        hints=tuple(hints_for(step, literals, region)),
        also=tuple(other.name for other in roots[1:]),
    )


class _Evidence:
    """Which values of a trace are known."""

    def __init__(self, trace: Trace, index: Index[Known], original: Trace | None) -> None:
        self.trace = trace
        self.prints: dict[str, Fingerprint | None] = {}
        self.found: dict[str, list[Known]] = {}
        self.by_name: dict[str, bool] = {}
        for name, value in trace.values.items():
            self.prints[name] = print_ = fingerprint(value)
            self.found[name] = index.find(print_) if print_ else []
            if original is not None and print_ is not None and name in original.values:
                self.by_name[name] = _same(value, original.values[name])

    def is_known(self, name: str) -> bool:
        """Whether a value is one of the model, or of the graph before it was rewritten."""
        return self.by_name.get(name, bool(self.found.get(name)))

    def roots(self) -> list[Step]:
        """Return the steps that make a value at fault of values that are not, in order."""
        guilty = self._guilty()
        return [
            step
            for step in self.trace.steps
            if any(name in guilty for name in step.writes)
            and not any(name in guilty for name in step.reads)
        ]

    def cause(self, step: Step) -> Step:
        """Return the step that spoils what a step with several results reads, or the step itself.

        One right result of a fused operator redeems all it reads, though it may depend on none of
        it but one value: present values are right where rotated queries are not. So a step before
        it is at fault if it makes something unknown for it alone of activations that are known.
        """
        if len(step.writes) == 1:
            return step
        wanted = set(step.reads)
        for earlier in self.trace.steps:
            made = wanted & set(earlier.writes)
            if any(self._is_unknown(name) for name in made) and any(
                self.is_known(name) for name in earlier.reads
            ):
                return earlier
        return step

    def _is_unknown(self, name: str) -> bool:
        print_ = self.prints.get(name)
        return print_ is not None and not print_.is_mask and not self.is_known(name)

    def _guilty(self) -> set[str]:
        """Return the values that are unknown, as is all that is computed of them.

        A value that leads to no result is nobody's fault; runtimes leave some of them empty. A mask
        that is known says nothing about numbers it was made of, only about other masks.
        """
        readers: dict[str, list[Step]] = {}
        for step in self.trace.steps:
            for name in step.reads:
                readers.setdefault(name, []).append(step)
        redeems: dict[str, set[bool]] = {}  # value -> known values of both kinds it leads to
        needed = set(self.trace.outputs)
        for step in reversed(self.trace.steps):
            for name in step.writes:
                reached = {
                    kind
                    for reader in readers.get(name, ())
                    for result in reader.writes
                    for kind in redeems.get(result, set())
                }
                print_ = self.prints.get(name)
                if print_ is not None and self.is_known(name):
                    reached.add(print_.is_mask)
                redeems[name] = reached
            if needed & set(step.writes):
                needed |= set(step.reads)
        return {
            name
            for name, reached in redeems.items()
            if name in needed
            and (print_ := self.prints.get(name)) is not None
            and not (reached if print_.is_mask else reached - {True})
        }

    def words(self, name: str) -> str:
        """Say what a value is in the model."""
        known = self.found.get(name)
        if known:
            return str(known[0])
        return "the same as before the rewrite" if self.by_name.get(name) else "unknown"

    def literals(self, step: Step) -> dict[str, Any]:
        """Return the numbers a step reads as constants, by name of the constant."""
        constants = {name: self.trace.constants.get(name) for name in step.reads}
        return {
            name: value.tolist() if value.dim() else value.item()
            for name, value in constants.items()
            if value is not None and value.numel() <= _LITERAL
        }


def _same(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    return within_rounding(value, other, None)


def _nearest_region(program: Program, evidence: _Evidence, step: Step) -> Region | None:
    """Return the part of the model a step stands for, or else one of those that use its result."""
    reached = set(step.writes)
    found = _region(program, evidence, step)
    for later in evidence.trace.steps if found is None else ():
        if reached & set(later.reads):
            reached |= set(later.writes)
            found = found or _region(program, evidence, later)
    return found


def _region(program: Program, evidence: _Evidence, step: Step) -> Region | None:
    """Return the smallest part of the model that holds or reads most of what a step reads."""
    reads = [set(_places(evidence.found.get(name, ()))) for name in step.reads]
    weights = {
        id(tensor)
        for name in step.reads
        if name in evidence.trace.constants
        for tensor in _tensors_like(program, evidence.trace.constants[name])
    }

    def score(region: Region) -> tuple[int, int, int]:
        inside = {(region.instance, node) for node in region.nodes}
        around = inside | {(region.instance, node) for node in region.inputs}
        held = {id(tensor) for tensor in _weights_of(region)}
        return (
            sum(bool(places & around) for places in reads) + len(held & weights),
            sum(bool(places & inside) for places in reads),
            -len(region.nodes),
        )

    kind = kind_of(step.op)
    kinds: tuple[type[Region], ...] = (kind,) if kind else (Attention, FeedForward, Norm)
    candidates = list(regions(program, *kinds))
    best = max(candidates, key=score, default=None)
    return best if best is not None and score(best)[0] else None


def _weights_of(region: Region) -> Iterator[Tensor]:
    """Yield the weights that the nodes of a region read."""
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                yield region.tensor(source)


def _places(known: Sequence[Known]) -> Iterator[tuple[str | None, Any]]:
    return ((each.instance, each.node) for each in known)


def _tensors_like(program: Program, constant: Tensor) -> Iterator[Tensor]:
    """Yield the weights of the model that hold the numbers of a constant."""
    wanted = fingerprint(constant)
    if wanted is None or wanted.numbers is None:
        return
    for tensor in program.tensors.values():
        if tensor.numel() == constant.numel():
            index: Index[int] = Index()
            index.add(0, tensor, 1e-6)
            if index.find(wanted):
                yield tensor


def _constants(region: Region) -> dict[str, Any]:
    if isinstance(region, Attention):
        return {**region.constants(), "window": region.window, "softcap": region.softcap}
    if isinstance(region, Norm):
        return {"form": region.form, "eps": region.eps}
    return region.constants() if isinstance(region, FeedForward) else {}


def suspect_of_error(error: LoweringError, operators: Mapping[str, str]) -> Suspect:
    """Return the node a runtime blames for not running.

    Args:
        error: What was raised.
        operators: Operator by node name.
    """
    name = error.where or ""
    return Suspect(name or "unknown", operators.get(name, ""), "", {}, {}, hints=(error.what,))
