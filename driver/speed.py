"""Undo what made a block slower.

Each kind of block a pass has changed is lowered on its own, before and after, and timed in turns on
what it is really called with. When the whole interval of the speed-up lies below one, the
replacements in all blocks of the kind are taken back. What the machine's noise hides stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..backends.registry import get_backend
from ..ir.cut import cut_instance
from ..ir.program import Program
from ..ir.regions import Region
from ..ir.run import run
from .measure import Comparison, compare
from .numerics import Inputs

Compare = Callable[[Mapping[str, Callable[[], object]]], Comparison]


@dataclass(frozen=True)
class SpeedGuard:
    """Where and how blocks are timed.

    Attributes:
        backend: Backend the program is compiled for.
        options: Its options; one thread unless they say otherwise.
        compare: Times candidates against the first; see `driver.measure`.
    """

    backend: str = "eager"
    options: Mapping[str, Any] = field(default_factory=dict)
    compare: Compare = lambda calls: compare(calls, rounds=9, budget_s=10)

    def slower(
        self,
        old: Program,
        new: Program,
        replaced: Sequence[tuple[Region, nn.Module]],
        inputs: Inputs,
    ) -> dict[str, str]:
        """Return the replacements to take back, reason by label.

        Args:
            old: The program before the pass.
            new: The program after it.
            replaced: Regions replaced and what stands in their place.
            inputs: Flat inputs of the programs.

        Raises:
            LoweringError: The backend cannot run a block.
        """
        labels: dict[tuple[str, str], dict[str, list[str]]] = {}
        for region, _ in replaced:
            if name := region.instance:
                kind = old.instances[name].block, new.instances[name].block
                labels.setdefault(kind, {}).setdefault(name, []).append(region.label)
        if not labels:
            return self._whole(old, new, replaced, inputs)
        chosen = [next(iter(by_instance)) for by_instance in labels.values()]
        values = _block_inputs(old, chosen, inputs)
        doomed: dict[str, str] = {}
        for name, by_instance in zip(chosen, labels.values(), strict=True):
            before, _ = cut_instance(old, name, values[name])
            after, tensors = cut_instance(new, name, values[name])
            reason = self._slower(before, after, tensors, name)
            if reason:
                doomed |= {label: reason for found in by_instance.values() for label in found}
        return doomed

    def _whole(
        self,
        old: Program,
        new: Program,
        replaced: Sequence[tuple[Region, nn.Module]],
        inputs: Inputs,
    ) -> dict[str, str]:
        """Judge a model without repeated blocks as one block."""
        if old.instances:
            return {}
        reason = self._slower(old, new, inputs, "the model")
        return {region.label: reason for region, _ in replaced} if reason else {}

    def _slower(self, old: Program, new: Program, inputs: Inputs, name: str) -> str | None:
        backend, options = get_backend(self.backend), {"threads": 1, **self.options}
        calls = {
            which: _call(backend.lower(program, options).run, inputs)
            for which, program in (("old", old), ("new", new))
        }
        found = self.compare(calls)
        speedup, (_, high) = found.timings["new"].speedup, found.timings["new"].interval
        if found.objection or high >= 1:
            return None
        return f"made {name} {1 / speedup:.2f} times slower on {self.backend}"


def _block_inputs(program: Program, names: Sequence[str], inputs: Inputs) -> dict[str, list[Any]]:
    """Return what block instances are called with."""
    calls = {str(n.target): n for n in program.calls() if str(n.target) in names}
    wanted = {node for call in calls.values() for node in call.all_input_nodes}
    values: dict[fx.Node, Any] = {}

    def saw(instance: str | None, node: fx.Node, value: Any) -> None:
        if instance is None and node in wanted:
            values[node] = value

    run(program, inputs, on_node=saw)
    return {name: [values[node] for node in call.args] for name, call in calls.items()}  # type: ignore[index]


def _call(run_: Callable[[Sequence[Tensor]], object], inputs: Inputs) -> Callable[[], object]:
    return lambda: run_(inputs)
