"""Remove the least important heads of attentions.

    y = sum over heads h of softmax(q_h @ k_h.T) @ v_h @ W_h.T          W_h: [dim, head_dim]

Head h is its rows of the query, key and value projections with biases and norms, and its columns of
the output projection. Where query heads share keys and values, whole groups go, or as many query
heads of each group, which leaves keys and values (and a cache of them) as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention, Coupled, coupled_heads
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.narrow import check_narrowing, evidence_of, plan_each, scored, strongest


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Pass[Attention, list[int]]):
    """Prune attention heads by importance.

    Attributes:
        keep_ratio: Fraction of the heads of each attention that stays, more than 0, at most 1.
        keep: Number of query heads of each attention that stays; takes the place of `keep_ratio`.
        importance: `magnitude` of a head's weights; `taylor`, the first-order change of the loss;
            `activation` times the weights that read it; `random`.
        unit: What goes at once where query heads share keys and values: the whole `group`, or one
            `query` head of every group.
        seed: For `random`, and for `taylor` without targets.
        include: Glob patterns of module paths to prune.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range, or scores are wanted of inputs and there are none.

    Source: Michel et al., 2019, arXiv:1905.10650 (heads by the gradient of the loss); Ainslie et
        al., 2023, arXiv:2305.13245 (groups).
    Differs: a head's weights are ranked together; every attention keeps the same share of heads.
        Without targets, `taylor` takes random signs of the outputs for the loss.
    Exact when: the columns of the output projection that belong to removed heads are zero.
    """

    name: ClassVar[str] = "prune-heads"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must cut"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"importance": "activation", "unit": "query"},
    )
    keep_ratio: float = 0.5
    keep: int | None = None
    importance: str = "magnitude"
    unit: str = "group"
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_narrowing(self.name, self.importance, self.keep, self.keep_ratio, 1)
        require_choice(self.name, "unit", self.unit, ("group", "query"))

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        wanted = (self._coupled(a) for a in self.regions(program) if self._selects(a))
        return evidence_of(self.importance, wanted, calibration, self.seed)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[list[int]]:
        return plan_each(self.regions(program), self.decide, evidence)

    def decide(self, attention: Attention, scores: Tensor | None = None) -> list[int] | Skip:
        if not self._selects(attention):
            return Skip("is excluded by pattern", at=attention)
        coupled, heads = self._coupled(attention), attention.heads
        if heads == 1:
            return Skip("has one head", at=attention)
        if coupled.objection or heads is None:
            return Skip(coupled.objection or "has an unknown number of heads", at=attention)
        count, rest = self._count(heads, coupled)
        if rest:
            return Skip(
                f"has {heads} heads, of which {self.keep} are no whole groups", at=attention
            )
        if count >= coupled.count:
            return Skip(f"has {heads} heads, all of which would be kept", at=attention)
        if count < 1:
            return Skip(f"has {heads} heads, of which {self} would keep none", at=attention)
        if scores is None:
            scores = scored(self.importance, coupled, self.seed, self.name)
        return strongest(scores, count, coupled.groups)

    def replace(self, attention: Attention, heads: list[int]) -> nn.Module:
        return self._coupled(attention).keep(heads)

    def _selects(self, attention: Attention) -> bool:
        return selected(attention.label, self.include, self.exclude)

    def _coupled(self, attention: Attention) -> Coupled:
        return coupled_heads(attention, queries=self.unit == "query")

    def _count(self, heads: int, coupled: Coupled) -> tuple[int, int]:
        """Return how many units stay, and how many heads are left over beside whole groups."""
        if self.keep is None:
            return round(coupled.count / coupled.groups * self.keep_ratio) * coupled.groups, 0
        size = heads // coupled.count if coupled.groups == 1 else coupled.groups
        units, rest = divmod(self.keep, size)
        return (units if coupled.groups == 1 else units * size), rest
