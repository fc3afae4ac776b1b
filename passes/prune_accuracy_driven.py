"""Remove what makes the answers of a fine-tuned model worse.

    accept a candidate  <=>  loss < lowest so far   and   most samples are no worse than at first

Candidates come in this order. First every attention is tried with its K nearest keys alone. Then,
from the last layer to the first, the feed-forward network is taken out as a whole; if that is not
accepted, but not far off, group by group of its neurons. Then the attention likewise, head by head.
The samples are labelled and must be part of the training set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention, FeedForward, Summand
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, judged, require_choice
from .shared.cut import Cut, cut
from .shared.greedy import Rules, Search
from .shared.without import without


@dataclass(frozen=True, kw_only=True)
class PruneAccuracyDriven(Pass[Summand | Attention | FeedForward, Cut]):
    """Prune sublayers, heads and groups of neurons whose removal lowers the loss of a task.

    A sublayer `blocks.0.attention` goes under its addition, `blocks.0.attention.residual`; its
    heads and neurons under its own path.

    Attributes:
        top_k: Keys a query looks at where attention is made hard; 0 leaves attentions soft.
        group_size: Neurons tried at once. A network with less than twelve such groups is tried in
            twelfths.
        fine: A sublayer is tried in parts if the loss without it is less than `fine` times the
            lowest so far, 1 or more.
        majority: Fraction of the samples, at least 0 and below 1; more than these must be no worse
            than before the search.
        order: `last-first` or `first-first`: in which layer pruning starts.
        budget: Most evaluations of the loss; None for no limit.

    Raises:
        OptionError: An option is out of range; the calibration comes without targets; or the loss
            is no number.

    Source: Nagarajan et al., AxFormer, 2020, arXiv:2010.03688.
    Differs: for any transformer; key and value heads go with the query heads that read them; one
        head and one group always stay; means are of samples, not of batches.
    Exact when: no candidate is accepted.
    """

    name: ClassVar[str] = "prune-accuracy-driven"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must cut"}
    top_k: int = 30
    group_size: int = 256
    fine: float = 1.1
    majority: float = 0.5
    order: str = "last-first"
    budget: int | None = None

    def __post_init__(self) -> None:
        require_choice(self.name, "order", self.order, ("last-first", "first-first"))
        for option, least in (("top_k", 0), ("group_size", 1), ("fine", 1), ("budget", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise OptionError(
                    f"{self.name}: {option}={value} is too small; use {least} or more."
                )
        if not 0 <= self.majority < 1:
            raise OptionError(
                f"{self.name}: majority={self.majority} is no fraction; use 0 or more, below 1."
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        rules = Rules(
            top_k=self.top_k or None,
            group_size=self.group_size,
            fine=self.fine,
            majority=self.majority,
            last_first=self.order == "last-first",
            budget=self.budget,
        )
        search = Search(program, judged(calibration, self.name), rules, self.name)
        search.run(list(self.regions(program)))
        return Evidence(len(search.at_first), search.found)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Cut]:
        found = list(self.regions(program))
        if evidence is None:
            if not found:
                return Plan({})
            raise OptionError(
                f"{self.name} decides by the loss of a task, which is not measured yet.",
                remedy="run it with calibration=[(inputs, target), ...] and loss=...",
            )
        cuts, tried = evidence.regions["cuts"], evidence.regions["tried"]
        skips = {r.label: tried.get(r.label, "was not tried") for r in found if r.label not in cuts}
        return Plan({r.label: cuts[r.label] for r in found if r.label in cuts}, skips)

    def decide(self, region: Summand | Attention | FeedForward) -> Cut | Skip:
        return Skip("is only decided about with all others", at=region)

    def replace(self, region: Summand | Attention | FeedForward, decision: Cut) -> nn.Module:
        return without(region) if isinstance(region, Summand) else cut(region, decision)

    def statistics(self, plan: Plan[Cut]) -> Mapping[str, int]:
        cuts = plan.decisions.values()
        return {
            "sublayers dropped": sum(cut.drop for cut in cuts),
            "parts removed": sum(cut.removed for cut in cuts),
            "hard attentions": sum(cut.top_k is not None for cut in cuts),
        }
