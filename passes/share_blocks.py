"""Let blocks share their layers and keep norms of their own.

    x = x + attention(norm_i(x))        attention and feed-forward network are the same for all i
    x = x + ffn(norm'_i(x))

Blocks stay as many as they are; weights become one set per group. With experts, the network of a
group is several, each from another depth, of which a token visits a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Attention, Block, FeedForward
from ..ir.region_module import Call, RegionModule
from ..ir.regions import Region
from .base import Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.moe import Gating, stacked, visit
from .shared.neurons import PARTS, Neurons, as_parameter, cannot_split
from .shared.recovery import Stage
from .shared.students import key_of
from .shared.tying import (
    alike,
    block_at,
    common_weights,
    once,
    own_nodes,
    taught_back,
)

SHARED: Mapping[str, tuple[type[Region], ...]] = {
    "both": (Attention, FeedForward),
    "attention": (Attention,),
    "feed_forward": (FeedForward,),
}
STARTS = ("mean", "first", "middle", "last")


@dataclass(frozen=True)
class Share:
    """Whose weights a block reads.

    Attributes:
        sources: Labels of the blocks they start from: the mean of several.
        experts: Labels of the blocks whose networks become experts; none for no experts.
    """

    sources: list[str]
    experts: list[str]


@dataclass(frozen=True, kw_only=True)
class ShareBlocks(Pass[Block, Share]):
    """Share attention and feed-forward weights across blocks; norms stay private.

    Attributes:
        groups: Sets of weights per run of isomorphic blocks, each for as many blocks in a row.
        what: `both`, `attention` or `feed_forward`: the sublayers that are shared.
        start: Weights to begin with: `mean` of the group's blocks, or those of its `first`,
            `middle` or `last`.
        experts: Experts in the place of a group's feed-forward network; 0 for one dense network.
        active: Experts a token visits.
        private_norms: Whether norms, and the modulation of a condition, stay a block's own.
        noise: Standard deviation of the router's first weights.
        seed: Draws them.
        epochs: Times the calibration is gone through when weights are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of blocks that may share.
        exclude: Glob patterns of blocks that keep their weights.

    Raises:
        OptionError: An option is out of range.

    Source: Xue et al., WideNet, 2022, arXiv:2107.11817, sections 2 and 3.
    Differs: starts from a trained model, which the paper trains from scratch, and is trained
        back with the features and outputs of that model; no expert has a capacity.
    Exact when: the blocks of a group have equal weights; with experts, when there is one.
    """

    name: ClassVar[str] = "share-blocks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.DISTINCT_BLOCKS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must average"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"experts": 2, "active": 1})
    groups: int = 1
    what: str = "both"
    start: str = "mean"
    experts: int = 0
    active: int = 2
    private_norms: bool = True
    noise: float = 0.02
    seed: int = 0
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "what", self.what, tuple(SHARED))
        require_choice(self.name, "start", self.start, STARTS)
        if self.groups < 1 or self.epochs < 1 or self.rate <= 0 or self.noise < 0:
            raise OptionError(
                f"{self.name}: groups={self.groups}, epochs={self.epochs}, rate={self.rate},"
                f" noise={self.noise}.",
                remedy="use one group, one epoch, a positive rate, noise of 0 or more.",
            )
        if self.experts < 0 or (self.experts and not 1 <= self.active <= self.experts):
            raise OptionError(
                f"{self.name}: {self.active} of {self.experts} experts active.",
                remedy="use experts=0 for none, or between 1 and all of them active.",
            )
        if self.experts and self.what == "attention":
            raise OptionError(f"{self.name}: experts are feed-forward networks; share these too.")

    def ends(self) -> frozenset[Fact]:
        experts = {Fact.PLAIN_FEED_FORWARDS} if self.experts else set()
        return frozenset({Fact.DISTINCT_BLOCKS, Fact.CALIBRATED} | experts)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Share]:
        decisions: dict[str, Share] = {}
        skips: dict[str, str] = {}
        for stack in program.stacks():
            for kind in alike(stack):
                free: list[Block] = []
                for block in kind:
                    decision = self.decide(block)
                    if isinstance(decision, Skip):
                        skips[block.label] = decision.reason
                    else:
                        free.append(block)
                for group in _chunks([block.label for block in free], self.groups):
                    if len(group) > 1:
                        shared = Share(_started(group, self.start), self._experts(group))
                        decisions |= dict.fromkeys(group, shared)
                    else:
                        skips |= dict.fromkeys(group, "has no other block to share with")
        order = [block.label for block in program.blocks() if block.label in decisions]
        return Plan({label: decisions[label] for label in order}, skips)

    def decide(self, region: Block) -> Share | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        parts = self._parts(region)
        if not parts:
            return Skip(f"has no {self.what.replace('_', '-')} to share", at=region)
        if self.experts:
            networks = [part for part in parts if isinstance(part, FeedForward)]
            if len(networks) != 1:
                return Skip(f"has {len(networks)} networks to turn into experts", at=region)
            if reason := cannot_split(networks[0]):
                return Skip(reason, at=region)
        return Share([region.label], [])

    def replace(self, region: Block, decision: Share) -> nn.Module:
        weights = common_weights(region, decision.sources, self._private(region))
        if not decision.experts:
            return RegionModule(region, weights)
        (network,) = region.feed_forwards
        experts = once(
            region.program,
            (self, *decision.experts),
            lambda: self._mixture(region.program, decision),
        )
        module = RegionModule(region, weights, {network.y: Call(experts, (network.x,))})
        module.shared_experts = experts
        return module

    def recovery(self, old: Program, new: Program, plan: Plan[Share]) -> Sequence[Stage]:
        keys = {key_of(block_at(old, label)) for label in plan.decisions}
        trained = [block for block in new.blocks() if key_of(block) in keys]
        taught = {label: label for label in plan.decisions}
        return taught_back(
            old, new, taught, trained, name="share", epochs=self.epochs, rate=self.rate
        )

    def _parts(self, block: Block) -> list[Any]:
        return [s.region for s in block.sublayers if isinstance(s.region, SHARED[self.what])]

    def _private(self, block: Block) -> set[Any]:
        """Return the `get_attr` nodes whose weights stay the block's own."""
        own = own_nodes(block) if self.private_norms else set()
        if self.what == "both":
            return own
        inside = {node for part in self._parts(block) for node in part.nodes}
        read = {n for node in inside for n in node.all_input_nodes if n.op == "get_attr"}
        return {node for node in block.weight_nodes if node not in read} | own

    def _experts(self, group: Sequence[str]) -> list[str]:
        """Return the blocks whose networks become experts, spread evenly over the depth."""
        count = self.experts
        return [group[int((e + 0.5) * len(group) / count)] for e in range(count)]

    def _mixture(self, program: Program, decision: Share) -> SharedExperts:
        blocks = [block_at(program, label) for label in decision.experts]
        neurons = [Neurons.of(block.feed_forwards[0]) for block in blocks]
        generator = torch.Generator().manual_seed(self.seed)
        up = neurons[0].up
        router = torch.randn(len(neurons), up.shape[1], generator=generator) * self.noise
        return SharedExperts(neurons, router.to(up), Gating(self.active, "softmax"))


class SharedExperts(nn.Module):
    """Experts with a router; gates are not renormalised."""

    def __init__(self, experts: Sequence[Neurons], router: Tensor, gating: Gating) -> None:
        super().__init__()
        self.gating, self.activation = gating, experts[0].activation
        self.router = nn.Parameter(router, requires_grad=False)
        parts: dict[str, Tensor] = stacked(experts)
        if experts[0].down_bias is not None:
            parts["down_bias"] = torch.stack(
                [e.down_bias for e in experts if e.down_bias is not None]
            )
        for name in PARTS:
            self.register_parameter(name, as_parameter(parts.get(name)))

    def forward(self, x: Tensor) -> Tensor:
        index, gates = self.gating(F.linear(x, self.router))
        return visit(
            x, index, gates, {name: getattr(self, name) for name in PARTS}, self.activation
        )


def _started(group: Sequence[str], start: str) -> list[str]:
    picks = {"first": 0, "middle": (len(group) - 1) // 2, "last": -1}
    return list(group) if start == "mean" else [group[picks[start]]]


def _chunks(labels: Sequence[str], count: int) -> list[list[str]]:
    """Cut a list into parts of almost equal length, none of them empty."""
    count = min(count, len(labels)) or 1
    bounds = [round(i * len(labels) / count) for i in range(count + 1)]
    return [list(labels[a:b]) for a, b in pairwise(bounds) if a < b]
