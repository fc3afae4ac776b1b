"""A pass with its plan, carried out in part: some of its replacements and not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import fx, nn

from ..ir.errors import NoMatchError
from ..ir.program import Program
from ..ir.recognize import Block
from ..ir.regions import Region, find_once
from ..ir.rewrite import rewrite
from ..passes.base import Pass, Plan
from .numerics import Inputs
from .transaction import transaction

Replacement = tuple[Region, nn.Module]


@dataclass(frozen=True)
class Applied:
    """A pass on a program.

    Attributes:
        pass_: The pass.
        before: The program it was planned on.
        plan: What it decided.
        replaced: Every region the plan names with what stands in its place, in model order.
        inputs: Flat inputs it may calibrate and recover on.
        seed: Seed of its random numbers.
    """

    pass_: Pass[Any, Any]
    before: Program
    plan: Plan[Any]
    replaced: Sequence[Replacement]
    inputs: Sequence[Inputs]
    seed: int

    @classmethod
    def of(
        cls,
        pass_: Pass[Any, Any],
        program: Program,
        inputs: Sequence[Inputs],
        *,
        plan: Plan[Any] | None = None,
        seed: int = 0,
    ) -> Self:
        """Let a pass plan, or take a plan it made, and build what it replaces.

        Raises:
            NoMatchError: It changes nothing and may not.
        """
        with transaction(program, pass_.name, seed):
            if plan is None:
                plan = pass_.plan(program, pass_.measure(program, inputs))
            decisions = plan.decisions
            if not decisions and not pass_.allow_no_match:
                raise NoMatchError(
                    f"{pass_.name} changes nothing in this model.",
                    remedy="`blockwright compile` says why; or set allow_no_match=true.",
                )
            replaced = [
                (region, pass_.replace(region, decisions[region.label]))
                for region in pass_.regions(program)
                if region.label in decisions
            ]
        return cls(pass_, program, plan, replaced, inputs, seed)

    def after(self, some: Sequence[Replacement] | None = None) -> Program:
        """Return the program with some of the replacements made; by default with all."""
        some = self.replaced if some is None else some
        if not some:
            return self.before
        with transaction(self.before, self.pass_.name, self.seed):
            return rewrite(self.before, some, by=self.pass_.name)

    def restricted(self, some: Sequence[Replacement]) -> Plan[Any]:
        """Return the part of the plan that some of the replacements carry out."""
        return Plan({region.label: self.plan.decisions[region.label] for region, _ in some})


def by_block(program: Program, found: Sequence[Replacement]) -> dict[str, list[Replacement]]:
    """Group replacements by the block they are in, in model order.

    A block is an instance of a class; in the main graph, a residual block; elsewhere the region is
    a block of its own.
    """
    held: dict[fx.Node, str] = {}
    for block in find_once(program.main, Block):
        held.update(dict.fromkeys(block.nodes, block.path))
    groups: dict[str, list[Replacement]] = {}
    for region, module in found:
        place = region.instance or held.get(region.nodes[0]) or region.label
        groups.setdefault(place, []).append((region, module))
    return groups
