"""Remove the least important hidden neurons of feed-forward networks.

    y = act(x @ up.T) @ down.T          up: [ffn_dim, dim]    down: [dim, ffn_dim]

Neuron i is row i of `up` (and of `gate`) with its bias, kernel i of a depthwise convolution, and
column i of `down`. All of them go together, so nothing outside the network changes its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import FeedForward, coupled_neurons
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, selected
from .shared.narrow import check_narrowing, evidence_of, plan_each, scored, strongest


@dataclass(frozen=True, kw_only=True)
class PruneNeurons(Pass[FeedForward, list[int]]):
    """Prune hidden neurons of feed-forward networks by importance.

    Attributes:
        keep_ratio: Fraction of the neurons of each network that stays, more than 0, at most 1.
        keep: Number of neurons of each network that stays; takes the place of `keep_ratio`.
        importance: `magnitude` of a neuron's weights; `taylor`, the first-order change of the loss;
            `activation` times the weights that read it; `random`.
        multiple_of: What stays is rounded to a multiple of this, for kernels that like round sizes.
        seed: For `random`, and for `taylor` without targets.
        include: Glob patterns of module paths to prune.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range, or scores are wanted of inputs and there are none.

    Source: Molchanov et al., 2019, arXiv:1906.10771 (taylor); Li et al., 2017, arXiv:1608.08710
        (magnitude); Sun et al., 2023, arXiv:2306.11695 (activation).
    Differs: a neuron's weights are ranked together, those that read it with those that make it.
        Without targets, `taylor` takes random signs of the outputs for the loss.
    Exact when: the columns of `down` that belong to removed neurons are zero.
    """

    name: ClassVar[str] = "prune-neurons"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.PLAIN_FEED_FORWARDS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must cut"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"importance": "taylor", "keep_ratio": 0.7},
    )
    keep_ratio: float = 0.5
    keep: int | None = None
    importance: str = "magnitude"
    multiple_of: int = 1
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_narrowing(self.name, self.importance, self.keep, self.keep_ratio, self.multiple_of)

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        wanted = (coupled_neurons(ffn) for ffn in self.regions(program) if self._selects(ffn))
        return evidence_of(self.importance, wanted, calibration, self.seed)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[list[int]]:
        return plan_each(self.regions(program), self.decide, evidence)

    def decide(self, ffn: FeedForward, scores: Tensor | None = None) -> list[int] | Skip:
        if not self._selects(ffn):
            return Skip("is excluded by pattern", at=ffn)
        coupled = coupled_neurons(ffn)
        if coupled.objection:
            return Skip(coupled.objection, at=ffn)
        count = self._count(ffn.ffn_dim)
        if count >= ffn.ffn_dim:
            return Skip(f"has {ffn.ffn_dim} neurons, {count} would be kept", at=ffn)
        if count < 1:
            return Skip(f"has {ffn.ffn_dim} neurons, of which {self} would keep none", at=ffn)
        if scores is None:
            scores = scored(self.importance, coupled, self.seed, self.name)
        return strongest(scores, count)

    def replace(self, ffn: FeedForward, neurons: list[int]) -> nn.Module:
        return coupled_neurons(ffn).keep(neurons)

    def _selects(self, ffn: FeedForward) -> bool:
        return selected(ffn.label, self.include, self.exclude)

    def _count(self, ffn_dim: int) -> int:
        wanted = ffn_dim * self.keep_ratio if self.keep is None else self.keep
        return round(wanted / self.multiple_of) * self.multiple_of
