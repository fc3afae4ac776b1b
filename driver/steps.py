"""What is kept of a pass that was run: plan, receipt, certificate, times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.plain import fit, plain
from ..ir.program import Program
from ..passes.base import Pass, Plan
from .certify import Certificate
from .recover import Training


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
        statistics: Counters of the pass's own.
        trained: What each stage of recovery did.
    """

    candidates: int
    changed: tuple[str, ...]
    skipped: dict[str, str]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    nodes: tuple[int, int]
    statistics: dict[str, int] = field(default_factory=dict)
    trained: tuple[Training, ...] = ()

    @classmethod
    def of(
        cls,
        pass_: Pass[Any, Any],
        old: Program,
        new: Program,
        plan: Plan[Any],
        trained: tuple[Training, ...] = (),
    ) -> Receipt:
        """Write the receipt of a pass."""
        before, after = old.cost(), new.cost()
        return cls(
            candidates=len(plan.decisions) + len(plan.skips),
            changed=tuple(plan.decisions),
            skipped=dict(plan.skips),
            parameters=(before.parameters, after.parameters),
            bytes=(before.weight_bytes, after.weight_bytes),
            nodes=(old.nodes(), new.nodes()),
            statistics=dict(pass_.statistics(plan)),
            trained=trained,
        )

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
        resumed: Whether it was taken from a checkpoint.
    """

    pass_: Pass[Any, Any]
    plan: Plan[Any]
    receipt: Receipt
    certificate: Certificate | None
    seconds: dict[str, float]
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data; times are left out, so that equal runs give equal bytes."""
        return {
            "pass": self.pass_.name,
            "options": self.pass_.options(),
            "promise": str(self.pass_.promised()),
            "plan": self.plan.to_json(),
            "receipt": plain(self.receipt),
            "certificate": plain(self.certificate),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], pass_: Pass[Any, Any]) -> Step:
        """Return the step that `to_json` wrote of this pass.

        Raises:
            OptionError: The plan is not one of the pass.
            TypeError: The data is malformed.
        """
        return cls(
            pass_,
            Plan.from_json(data["plan"], type(pass_)),
            fit(data["receipt"], Receipt),
            fit(data["certificate"], Certificate | None),
            seconds={},
            resumed=True,
        )
