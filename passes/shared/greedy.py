"""The greedy search of AxFormer: change a model part by part as long as its loss falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.graphs import block_calls, positions
from ...ir.program import Program
from ...ir.recognize import Attention, FeedForward, Summand
from ...ir.regions import Region
from ..base import Judged
from .cut import Cut, coupled_of, masked
from .hard import cannot_harden
from .view import Change, View
from .without import apart, without

TWELFTHS = 12  # groups of neurons in BERT-base: 3072 / 256
Part = Attention | FeedForward


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the search goes; see `PruneAccuracyDriven` for what each of them means."""

    top_k: int | None
    group_size: int
    fine: float
    majority: float
    last_first: bool
    budget: int | None


@dataclass(frozen=True)
class Layer:
    """Sublayers of one block, each with its addition.

    Attributes:
        parts: Feed-forward networks, then attentions; with the addition, where one is known.
        start: First node of the main graph that computes any of them.
    """

    parts: tuple[tuple[Part, Summand | None], ...]
    start: fx.Node


class Search:
    """A search and what it has found so far.

    Attributes:
        at_first: Loss of each sample before the search, [samples].
        lowest: Mean loss of what is accepted so far.
        cuts: What is accepted, by label of the region.
        tried: What was not, by label of the region, in words.
        losses: Mean loss after each acceptance, the first one before any.
    """

    def __init__(self, program: Program, judged: Judged, rules: Rules, owner: str) -> None:
        self.program, self.rules, self.owner = program, rules, owner
        self.view = View(program, judged)
        self.at_first = self.view.losses()
        self.lowest = float(self.at_first.mean())
        if not math.isfinite(self.lowest):
            raise OptionError(
                f"{owner}: the loss of the model is {self.lowest} before anything is changed.",
                where="the calibration",
                remedy="leave out the samples that do it, or check the targets.",
            )
        self.losses = [self.lowest]
        self.cuts: dict[str, Cut] = {}
        self.tried: dict[str, str] = {}
        self._changes: dict[str, Change] = {}

    @property
    def evaluations(self) -> int:
        """How often the loss of all samples was measured."""
        return self.view.evaluations

    @property
    def found(self) -> dict[str, Any]:
        """What the search has found, and how it went."""
        return {
            "cuts": self.cuts,
            "tried": self.tried,
            "losses": self.losses,
            "evaluations": self.view.evaluations,
        }

    def run(self, regions: Sequence[Region]) -> None:
        """Try everything once, in order."""
        layers = layers_of(self.program, regions)
        for layer in layers if self.rules.top_k is not None else ():
            self.view.stop(layer.start, list(self._changes.values()))
            for part, _ in layer.parts:
                if isinstance(part, Attention):
                    self._harden(part)
        for layer in layers[::-1] if self.rules.last_first else layers:
            self.view.stop(layer.start, list(self._changes.values()))
            for part, summand in layer.parts:
                self._prune(part, summand)

    def _harden(self, attention: Attention) -> None:
        assert self.rules.top_k is not None
        reason = cannot_harden(attention, self.rules.top_k)
        if reason:
            self.tried[attention.label] = reason
        else:
            cut = replace(self._cut(attention), top_k=self.rules.top_k)
            self._try_part(attention, cut, f"with {cut.top_k} keys")

    def _prune(self, part: Part, summand: Summand | None) -> None:
        loss = -math.inf  # where the whole cannot go, parts are tried
        if summand is not None and summand.objection is None and self._is_free(summand):
            accepted, loss = self._try(summand.label, (summand, without(summand)), "without it")
            if accepted:
                self.cuts[summand.label] = Cut(drop=True)
                self.cuts.pop(part.label, None)
                self._changes.pop(part.label, None)
                self.tried[part.label] = "is dropped as a whole"
                return
        elif summand is not None:
            self.tried[summand.label] = summand.objection or "joins one that is dropped"
        coupled = coupled_of(part)
        if coupled.objection:
            self.tried.setdefault(part.label, coupled.objection)
        elif loss < self.rules.fine * self.lowest:
            for group in self._groups(part, coupled.count):
                self._remove(part, group, coupled.count)
        else:
            self.tried.setdefault(part.label, "stays: without all of it the loss is far too high")

    def _remove(self, part: Part, group: Sequence[int], count: int) -> None:
        old = self._cut(part)
        kept = tuple(sorted({*(range(count) if old.keep is None else old.keep)} - {*group}))
        if kept:
            cut = replace(old, keep=kept, removed=count - len(kept))
            self._try_part(part, cut, f"without {len(group)} of its {count} parts")

    def _groups(self, part: Part, count: int) -> Iterable[range]:
        """Return runs of neurons, or heads one by one."""
        by_head = isinstance(part, Attention)
        size = 1 if by_head else min(self.rules.group_size, -(-count // TWELFTHS))
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    def _try_part(self, part: Part, cut: Cut, how: str) -> None:
        accepted, _ = self._try(part.label, (part, masked(part, cut)), how)
        if accepted:
            self.cuts[part.label] = cut

    def _try(self, label: str, change: Change, how: str) -> tuple[bool, float]:
        """Judge the model with one change more, and keep it if it is accepted."""
        if self.rules.budget is not None and self.evaluations >= self.rules.budget:
            self.tried.setdefault(label, "was not tried: the budget is spent")
            return False, math.inf
        changes = {**self._changes, label: change}
        found = self.view.losses(list(changes.values()))
        loss = float(found.mean())
        accepted = loss < self.lowest and self._suits_most(found)
        if accepted:
            self._changes, self.lowest = changes, loss
            self.losses.append(loss)
        elif label not in self.cuts:
            self.tried[label] = f"stays: {how} the loss is {loss:.5g}, not {self.lowest:.5g}"
        return accepted, loss

    def _suits_most(self, found: Float[Tensor, " samples"]) -> bool:
        """Whether enough samples are no worse than before the search."""
        needed = math.floor(self.rules.majority * len(found))
        return int((found <= self.at_first).sum()) > needed

    def _cut(self, part: Part) -> Cut:
        return self.cuts.get(part.label, Cut())

    def _is_free(self, summand: Summand) -> bool:
        dropped = [region for region, _ in self._changes.values() if isinstance(region, Summand)]
        return summand in apart([*dropped, summand])


def layers_of(program: Program, regions: Iterable[Region]) -> list[Layer]:
    """Return the sublayers that can be cut, block by block, in execution order."""
    parts: dict[object, Part] = {}
    summands: dict[object, Summand] = {}
    for region in regions:
        if isinstance(region, Summand):
            summands[region.instance, region.sublayer.region.nodes] = region
        elif isinstance(region, Attention | FeedForward):
            parts[region.instance, region.nodes] = region
    layers = []
    for block in program.blocks():
        keys = [(block.instance, s.region.nodes) for s in reversed(block.sublayers)]
        found = [(parts[key], summands.get(key)) for key in keys if key in parts]
        found.sort(key=lambda pair: isinstance(pair[0], Attention))
        if found:
            layers.append(Layer(tuple(found), _start(program, [r for pair in found for r in pair])))
    return layers


def _start(program: Program, regions: Sequence[Region | None]) -> fx.Node:
    """Return the first node of the main graph that computes any of some regions."""
    order, calls = positions(program.main), block_calls(program.main)
    nodes = [
        calls[region.instance] if region.instance else node
        for region in regions
        if region is not None
        for node in region.nodes
    ]
    return min(nodes, key=order.__getitem__)
