"""Find the experts that a trained feed-forward network has already, and visit a few of them.

    y = sum over i in top-k of  expert[i](x) + bias          score[i] = mean key of expert i . x

Neurons whose keys (rows of `up`, or of `gate`) point the same way answer the same tokens: they are
one expert, and their mean key tells for which tokens. Nothing is trained, no parameter is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Experts, FeedForward
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
from .shared.clusters import balanced_clusters
from .shared.moe import Gating, Split, routed
from .shared.moe_curve import examined, inputs_of
from .shared.neurons import Neurons, beside, cannot_split

CLUSTERS = ("balanced", "contiguous", "random")


@dataclass(frozen=True, kw_only=True)
class EmergentMoE(Pass[FeedForward, Split]):
    """Split feed-forward networks into the experts their keys form, and visit the nearest.

    Attributes:
        experts: Experts of a network; they must divide its neurons.
        active: Experts a token visits, 1 to `experts`.
        cluster: How neurons are grouped: `balanced` k-means of their keys, or, to compare with,
            `contiguous` or `random`.
        seed: Seed of the first centres, and of random groups.
        include: Glob patterns of module paths to convert; the method was published for a few of
            the last layers.
        exclude: Glob patterns of module paths to leave alone.

    Raises:
        OptionError: An option is out of range.

    Source: Qiu, Huang and Fu, 2024 (Emergent Mixture-of-Experts), arXiv:2310.10908.
    Differs: places in a cluster are auctioned; no capacity limit, so no token is dropped; the bias
        behind the neurons is added once, so that it does not depend on `active`; of the routers for
        gated networks, the one by the mean of the gate.
    Exact when: `active` is `experts`.
    """

    name: ClassVar[str] = "emergent-moe"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.PLAIN_FEED_FORWARDS})
    verbs: ClassVar[Mapping[Fact, str]] = {
        Fact.DENSE_WEIGHTS: "must group",
        Fact.PLAIN_FEED_FORWARDS: "must split",
    }
    examples: ClassVar[tuple[Mapping[str, object], ...]] = ({"experts": 2, "active": 1},)
    experts: int = 16
    active: int = 4
    cluster: str = "balanced"
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "cluster", self.cluster, CLUSTERS)
        if self.experts < 1:
            raise OptionError(f"{self.name}: experts={self.experts} is none; use 1 or more.")
        if not 1 <= self.active <= self.experts:
            raise OptionError(
                f"{self.name}: active={self.active} is out of range; use 1 to {self.experts},"
                " the number of experts."
            )

    def ends(self) -> frozenset[Fact]:
        everywhere = self.include == ("*",) and not self.exclude
        return frozenset({Fact.PLAIN_FEED_FORWARDS}) if everywhere else frozenset()

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        networks = [ffn for ffn in self.regions(program) if self._obstacle(ffn) is None]
        seen = inputs_of(program, networks, calibration)
        return Evidence(samples=count_of(calibration), regions=seen)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Split]:
        plan, seen = super().plan(program), evidence.regions if evidence else {}
        networks = {ffn.label: ffn for ffn in self.regions(program)}
        splits = {
            label: examined(Neurons.of(networks[label]), split, seen.get(label))
            for label, split in plan.decisions.items()
        }
        return Plan(splits, plan.skips)

    def decide(self, ffn: FeedForward) -> Split | Skip:
        reason = self._obstacle(ffn)
        return Skip(reason, at=ffn) if reason else Split([], self._groups(ffn), self.active)

    def _obstacle(self, ffn: FeedForward) -> str | None:
        """Say why a network stays dense, or None."""
        if not selected(ffn.label, self.include, self.exclude):
            return "is excluded by pattern"
        reason = cannot_split(ffn)
        if reason:
            return reason
        if ffn.ffn_dim % self.experts:
            return f"has {ffn.ffn_dim} neurons, which {self.experts} experts do not divide"
        if self.cluster == "balanced" and ffn.up.is_meta:
            return "has no weights to cluster; cluster=contiguous needs none"
        return None

    def _groups(self, ffn: FeedForward) -> list[list[int]]:
        if self.cluster == "balanced":
            return balanced_clusters(Neurons.of(ffn).keys, self.experts, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        random = self.cluster == "random"
        places = torch.randperm(ffn.ffn_dim, generator=generator).tolist() if random else None
        size = ffn.ffn_dim // self.experts
        order = places or list(range(ffn.ffn_dim))
        return [sorted(order[i : i + size]) for i in range(0, ffn.ffn_dim, size)]

    def replace(self, ffn: FeedForward, split: Split) -> nn.Module:
        gating = Gating(split.active)
        return beside(ffn, routed(Neurons.of(ffn), split, gating, train_router=False))

    def statistics(self, plan: Plan[Split]) -> Mapping[str, int]:
        splits = plan.decisions.values()
        return {
            "experts": sum(len(split.experts) for split in splits),
            "unused_experts": sum(split.unused for split in splits),
        }


def router_keys(program: Program, momentum: float = 0.0) -> dict[str, Tensor]:
    """Return what routers without parameters should hold, by name, after experts were trained.

    Args:
        program: Where the experts are.
        momentum: Share of what a router holds that stays, from 0 to 1.

    Source: Qiu, Huang and Fu, 2024, arXiv:2310.10908; the code released with it does this after
        every step of the optimiser.
    """
    found: dict[str, Tensor] = {}
    for region in program.regions(Experts):
        slot = region.router.weight_node if region.router else None
        if slot is None or region.tensor_name(slot) in program.parameters:
            continue
        weights = region.weights()
        keys = weights.get("gate", weights["up"]).mean(dim=1)
        found[region.tensor_name(slot)] = torch.lerp(keys, region.tensor(slot), momentum)
    return found
