"""Group consecutive blocks, of which each sample runs a few.

    x -> block 0 -> block 1 -> block 2 -> y

    s = alpha * tokens @ mean(x) + (1 - alpha) * condition @ c + bias        one score per block
    x -> those of the three that are in top-k(s), in their order -> y

The router reads the streams before the group and the vector that modulates its blocks. What it does
not choose is not computed: each block is the branch of a choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.only_when import OnlyWhen
from ..ir.program import Program
from ..ir.recognize import Place
from ..ir.taps import tapped
from .base import Calibration, Evidence, Pass, Plan, Promise, Skip, count_of
from .shared.block_groups import Grouped, grouped, taught_groups
from .shared.bypass import Bypass
from .shared.influence import mean_over
from .shared.recovery import Stage
from .shared.tying import once


@dataclass(frozen=True)
class Group:
    """The group a block is in.

    Attributes:
        blocks: Labels of its blocks, in execution order.
        active: How many of them run.
        bias: What the router begins to add to their scores.
    """

    blocks: list[str]
    active: int
    bias: list[float]


@dataclass(frozen=True, kw_only=True)
class MixtureOfBlocks(Pass[Grouped, Group]):
    """Run some blocks of each group, other ones for each sample and time step.

    Attributes:
        group: Blocks in a row that make a group, from the first block of each stack on; blocks that
            are left over always run.
        active: Blocks of a group that run.
        groups: First and last block of each group, counted from 0 over the whole model; `group`
            then says nothing.
        alpha: Weight of the tokens in a score, 0 to 1; the rest is that of the condition. Blocks
            that no condition modulates are chosen by their tokens alone.
        noise: Standard deviation of the router's first weights.
        seed: Draws them.
        epochs: Times the calibration is gone through when groups are trained back.
        rate: Largest learning rate of that training.
        include: Glob patterns of blocks that may be grouped; a group with others is left alone.
        exclude: Glob patterns of blocks that always run.

    Raises:
        OptionError: An option is out of range; groups overlap or lie across stacks.

    Source: Zheng et al., Dense2MoE, 2025, arXiv:2510.09094, section on the mixture of blocks.
    Differs: scores have a bias, which begins where all blocks of a group score alike on the
        calibration, so that it is the sample that decides. What a chosen block adds is never
        scaled: in training, the error its score can mend is told as if s scaled it by
        s / stop-gradient(s), since renormalised scores would teach a router of one block nothing.
        A choice is made for one sample, so programs take one at a time; call an engine once for
        each sample of a batch. Blocks that attend to the past alone are left as they are, as the
        mean over tokens knows those to come.
    Exact when: `active` is the size of the groups, bit by bit.
    """

    name: ClassVar[str] = "mixture-of-blocks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    group: int = 2
    active: int = 1
    groups: tuple[tuple[int, int], ...] = ()
    alpha: float = 0.5
    noise: float = 0.02
    seed: int = 0
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = [last - first + 1 for first, last in self.groups] or [self.group]
        if min(sizes) < 2:
            raise OptionError(
                f"{self.name}: a group of {min(sizes)} leaves nothing to choose.",
                remedy="group two blocks or more.",
            )
        if not 1 <= self.active <= min(sizes):
            raise OptionError(
                f"{self.name}: active={self.active} of a group of {min(sizes)} blocks.",
                remedy="run at least one, and no more than there are.",
            )
        if not 0 <= self.alpha <= 1 or self.noise < 0 or self.epochs < 1 or self.rate <= 0:
            raise OptionError(
                f"{self.name}: alpha={self.alpha}, noise={self.noise}, epochs={self.epochs},"
                f" rate={self.rate}.",
                remedy="use an alpha of 0 to 1, no negative noise, one epoch, a positive rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def regions(self, program: Program) -> Iterator[Grouped]:
        """Yield all blocks, in their groups, if they are in one."""
        spans = self.groups or self.group
        yield from grouped(program, spans, self.include, self.exclude, by=self.name)

    def measure(self, program: Program, calibration: Calibration) -> Evidence | None:
        decided = [(region, self.decide(region)) for region in self.regions(program)]
        firsts = [(r, d) for r, d in decided if isinstance(d, Group) and not r.place]
        if not firsts or any(tensor.is_meta for tensor in program.tensors.values()):
            return None
        routers = [self._router(region, decision) for region, decision in firsts]
        read = [Place(None, node) for region, _ in firsts for node in region.read]
        taps = tapped(program, read)

        def scores(inputs: Sequence[Tensor]) -> Tensor:
            values = iter(taps(*inputs))
            found = [
                router([next(values) for _ in region.start], *islice(values, len(region.told)))
                for router, (region, _) in zip(routers, firsts, strict=True)
            ]
            return torch.cat([score[0].double() for score in found])

        means = mean_over(calibration, scores).split([len(d.blocks) for _, d in firsts])
        known = {r.label: (-mean).tolist() for (r, _), mean in zip(firsts, means, strict=True)}
        return Evidence(count_of(calibration), known)

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[Group]:
        plan = super().plan(program)
        if evidence is None:
            return plan
        told = {
            label: replace(decision, bias=evidence.regions[decision.blocks[0]])
            for label, decision in plan.decisions.items()
        }
        return Plan(told, plan.skips)

    def decide(self, region: Grouped) -> Group | Skip:
        if region.objection is not None:
            return Skip(region.objection, at=region)
        return Group(list(region.group), self.active, [0.0] * len(region.group))

    def replace(self, region: Grouped, decision: Group) -> nn.Module:
        key = (self, *decision.blocks, *decision.bias)
        router = once(region.program, key, lambda: self._router(region, decision))
        places = [region.inputs.index(node) for node in region.start]
        told = [region.inputs.index(node) for node in region.told]
        takes = Takes(router, places, told, region.place, decision.active)
        return OnlyWhen(region, takes, Bypass(range(len(region.before))))

    def recovery(self, old: Program, new: Program, plan: Plan[Group]) -> Sequence[Stage]:
        groups = list(dict.fromkeys(tuple(group.blocks) for group in plan.decisions.values()))
        return taught_groups(old, new, groups, epochs=self.epochs, rate=self.rate)

    def statistics(self, plan: Plan[Group]) -> Mapping[str, int]:
        groups = {tuple(group.blocks): group.active for group in plan.decisions.values()}
        return {"groups": len(groups), "blocks run of them": sum(groups.values())}

    def _router(self, region: Grouped, decision: Group) -> Router:
        generator = torch.Generator().manual_seed(self.seed)
        count = len(decision.blocks)

        def drawn(*nodes: fx.Node) -> Tensor:
            width = sum(int(node.meta["val"].shape[-1]) for node in nodes)
            weight = torch.randn(count, width, generator=generator) * self.noise
            return weight.to(nodes[0].meta["val"].dtype)

        tokens = drawn(*region.start)
        told = drawn(*region.told) if region.told else None
        bias = torch.tensor(decision.bias, dtype=tokens.dtype)
        device = next(iter(region.program.tensors.values())).device
        return Router(tokens, told, bias, self.alpha).to(device)


class Router(nn.Module):
    """Scores of the blocks of a group.

    Args:
        tokens: [blocks, channels of all streams].
        condition: [blocks, channels of the condition], or None.
        bias: [blocks].
        alpha: Weight of the tokens.
    """

    def __init__(
        self, tokens: Tensor, condition: Tensor | None, bias: Tensor, alpha: float
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.tokens = nn.Parameter(tokens, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.condition = None if condition is None else nn.Parameter(condition, requires_grad=False)

    def forward(
        self, streams: Sequence[Tensor], condition: Tensor | None = None
    ) -> Float[Tensor, "batch blocks"]:
        pooled = torch.cat([x.mean(dim=list(range(1, x.dim() - 1))) for x in streams], dim=-1)
        scores = F.linear(pooled, self.tokens)
        if self.condition is not None and condition is not None:
            told = F.linear(condition.flatten(0, -2), self.condition)
            scores = self.alpha * scores + (1 - self.alpha) * told
        return scores + self.bias


class Takes(nn.Module):
    """Whether the one sample there is runs a block of a group.

    Args:
        router: Of the group.
        streams: Which inputs are the streams before the group.
        told: Which input is the condition, if any.
        place: Of the block in its group.
        active: Blocks that run.
    """

    def __init__(
        self,
        router: Router,
        streams: Sequence[int],
        told: Sequence[int],
        place: int,
        active: int,
    ) -> None:
        super().__init__()
        self.router, self.streams, self.told = router, tuple(streams), tuple(told)
        self.place, self.active = place, active

    def forward(self, *inputs: Tensor) -> Bool[Tensor, ""]:
        streams = [inputs[index] for index in self.streams]
        scores = self.router(streams, *(inputs[index] for index in self.told))
        return (scores.topk(self.active, dim=-1).indices == self.place).any()
