"""Turn feed-forward networks into one expert for all tokens and many of which each visits few.

    y = down(act(up(x)))   ->   y = shared(x) + sum over i in top-k of  g_i(x) * expert[i](x)

Neurons are ranked; the best of them are the shared expert, the rest are dealt out in turn. No
weight is added but the routers', and no neuron is lost, so with all experts on and gates of one
the network is what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import FeedForward
from ..ir.shapes import concrete
from .base import (
    Calibration,
    Evidence,
    Pass,
    Plan,
    Promise,
    Skip,
    count_of,
    require_choice,
    selected,
)
from .shared.importance import METHODS, neuron_importance
from .shared.moe import SCORES, Gating, Split, routed
from .shared.moe_curve import examined, inputs_of
from .shared.moe_stages import stages
from .shared.neurons import Neurons, beside, cannot_split
from .shared.recovery import Stage


@dataclass(frozen=True, kw_only=True)
class DenseToMoE(Pass[FeedForward, Split]):
    """Route tokens through a part of the neurons of every feed-forward network.

    Attributes:
        shared: Fraction of the neurons that every token visits, 0 or more and below 1.
        experts: Experts the other neurons are dealt out to; they must divide them evenly.
        active: Experts a token visits, 0 to `experts`. With 0 the others are dropped, which leaves
            a narrower dense network.
        score: What a router makes of its logits: `softmax`, `sigmoid`, or `unit`, gates of one.
        renormalise: Divide the gates of a token by their sum.
        scale: What gates are multiplied with; None for the number of experts with `softmax`, so
            that untrained gates are about one, and for 1 otherwise.
        importance: What ranks neurons: `taylor` (gradient times weight), `activation`, `magnitude`
            or `random`.
        overhead_flops: Work that visiting an expert costs beside its products. Networks where that
            and the router eat up the saving, at the tokens of the example, stay dense; with 0
            there are none.
        seed: Seed of the random ranking.
        include: Glob patterns of module paths to convert.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range, or the ranking needs calibration and has none.

    Source: Zheng et al., Dense2MoE, 2025, arXiv:2510.09094.
    Differs: routers begin at the mean key of their expert (arXiv:2310.10908), gates are scaled by
        the number of experts; gated networks and other rankings too.
    Exact when: `active` is `experts`, with `score="unit"` and `scale=1`.
    """

    name: ClassVar[str] = "dense-to-moe"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.PLAIN_FEED_FORWARDS})
    verbs: ClassVar[Mapping[Fact, str]] = {
        Fact.DENSE_WEIGHTS: "must deal out",
        Fact.PLAIN_FEED_FORWARDS: "must split",
    }
    examples: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"experts": 2, "active": 1, "importance": "magnitude", "shared": 0.5},
    )
    shared: float = 0.25
    experts: int = 12
    active: int = 2
    score: str = "softmax"
    renormalise: bool = False
    scale: float | None = None
    importance: str = "taylor"
    overhead_flops: int = 0
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "score", self.score, SCORES)
        require_choice(self.name, "importance", self.importance, tuple(METHODS))
        self._refuse("shared", self.shared, 0 <= self.shared < 1, "0 or more and below 1")
        self._refuse("experts", self.experts, self.experts >= 1, "1 or more")
        reach = f"0 to experts={self.experts}"
        self._refuse("active", self.active, 0 <= self.active <= self.experts, reach)
        self._refuse("overhead_flops", self.overhead_flops, self.overhead_flops >= 0, "0 or more")
        if self.scale is not None:
            self._refuse("scale", self.scale, 0 < self.scale < math.inf, "a positive number")
        if not self.shared and not self.active:
            raise OptionError(f"{self.name}: shared=0 and active=0 leave no neuron; raise one.")

    def _refuse(self, option: str, value: float, fits: bool, words: str) -> None:
        if not fits:
            raise OptionError(f"{self.name}: {option}={value} is out of range; use {words}.")

    def ends(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude and self.active
        return frozenset({Fact.PLAIN_FEED_FORWARDS}) if everywhere else frozenset()

    @property
    def gating(self) -> Gating:
        """What routers do with their logits."""
        usual = float(self.experts) if self.score == "softmax" and not self.renormalise else 1.0
        scale = usual if self.scale is None else self.scale
        return Gating(self.active, self.score, self.renormalise, scale)

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        networks = [ffn for ffn in self.regions(program) if self._obstacle(ffn) is None]
        networks = [ffn for ffn in networks if not ffn.up.is_meta]
        scores = neuron_importance(networks, self.importance, calibration, seed=self.seed)
        if scores and not any(found.any() for found in scores.values()):
            raise OptionError(
                f"{self.name}: the {self.importance} scores of all neurons are zero.",
                where="the calibration",
                remedy="give inputs that gradients flow for, or rank by importance=magnitude.",
            )
        seen = inputs_of(program, networks, calibration)
        found = {label: {"scores": s, "x": seen.get(label)} for label, s in scores.items()}
        return Evidence(samples=count_of(calibration), regions=found)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Split]:
        found = evidence.regions if evidence else {}
        decided = {ffn: self.decide(ffn) for ffn in self.regions(program)}
        splits: dict[str, Split] = {}
        for ffn, split in decided.items():
            if isinstance(split, Split):
                known = found.get(ffn.label)
                splits[ffn.label] = self._dealt(ffn, split, known) if known else split
        skips = {skip.at.label: skip.reason for skip in decided.values() if isinstance(skip, Skip)}
        return Plan(splits, skips)

    def decide(self, ffn: FeedForward) -> Split | Skip:
        reason = self._obstacle(ffn)
        return Skip(reason, at=ffn) if reason else self._deal(range(ffn.ffn_dim))

    def _dealt(self, ffn: FeedForward, split: Split, known: Mapping[str, Tensor]) -> Split:
        """Deal neurons out by rank, and see what that costs."""
        ranked = known["scores"].argsort(descending=True, stable=True).tolist()
        return examined(Neurons.of(ffn), self._deal(ranked), known["x"])

    def _deal(self, ranked: Sequence[int]) -> Split:
        """Give the first neurons to the shared expert, the others to the experts in turn."""
        first = round(self.shared * len(ranked))
        rest = ranked[first:]
        experts = [list(rest[i :: self.experts]) for i in range(self.experts)]
        return Split(list(ranked[:first]), experts, self.active)

    def _obstacle(self, ffn: FeedForward) -> str | None:
        """Say why a network stays dense, or None."""
        if not selected(ffn.label, self.include, self.exclude):
            return "is excluded by pattern"
        reason = cannot_split(ffn)
        if reason:
            return reason
        rest = ffn.ffn_dim - round(self.shared * ffn.ffn_dim)
        if rest % self.experts or not rest:
            return (
                f"has {ffn.ffn_dim} neurons, of which {rest} are not shared:"
                f" {self.experts} experts do not divide them evenly"
            )
        if rest == ffn.ffn_dim and not self.active:
            return "would keep no neuron"
        return self._too_small(ffn)

    def _too_small(self, ffn: FeedForward) -> str | None:
        """Say that routing costs more than it saves, if it does."""
        size = concrete(ffn.program, None)
        tokens = math.prod(size(s) for s in ffn.x.meta["val"].shape[:-1])
        matrices = 3 if ffn.is_gated else 2
        kept = round(self.shared * ffn.ffn_dim)
        idle = (ffn.ffn_dim - kept) * (self.experts - self.active) // self.experts
        saved = 2 * tokens * matrices * ffn.dim * idle
        router = 2 * tokens * self.experts * ffn.dim if self.active else 0
        spent = router + self.overhead_flops * min(self.experts, tokens * self.active)
        if self.overhead_flops and spent >= saved:
            return (
                f"is faster dense: of {tokens} tokens, routing saves {saved:,} FLOPs of {spent:,}"
            )
        return None

    def replace(self, ffn: FeedForward, split: Split) -> nn.Module:
        gating = replace(self.gating, active=split.active)
        network = routed(Neurons.of(ffn), split, gating, train_router=True)
        return beside(ffn, network)

    def statistics(self, plan: Plan[Split]) -> Mapping[str, int]:
        splits = plan.decisions.values()
        return {
            "experts": sum(len(split.experts) for split in splits if split.active),
            "unused_experts": sum(split.unused for split in splits),
        }

    def recovery(self, old: Program, new: Program, plan: Plan[Split]) -> Sequence[Stage]:
        return stages(old, new, set(plan.decisions))
