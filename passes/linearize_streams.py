"""Leave one stream of a multimodal model out of groups of blocks.

    block a        computes image and text as before; m: what its attention reads of the text
    blocks to b    attention reads m + map(m) in the place of the text; nothing is added to it
    behind b       text = c + end(c), c: the text behind a

Queries, keys and values of the text stay, everything else of it goes from the blocks a+1 to b:
modulation, norms, feed-forward network and the layer behind attention. All maps are linear, and
start as the best ones on the calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from .base import Evidence, Pass, Plan, Promise, Skip
from .shared.losses import output_mse
from .shared.recovery import Fit, Stage
from .shared.stream_groups import BlockGroup, WithoutStream, ends_of


@dataclass(frozen=True, kw_only=True)
class LinearizeStreams(Pass[BlockGroup, int]):
    """Replace a stream of groups of joint blocks by linear maps of what it was before.

    Attributes:
        groups: First and last block of each group by their paths, as in
            `("transformer_blocks.36", "transformer_blocks.37")`; the first stays whole.
        stream: Which of the streams that attention joins, counted from 0; mostly the first is text.
        epochs: How often the maps see the calibration.
        rate: Learning rate.

    Raises:
        OptionError: A block is not there, groups overlap, or a group cannot do without the stream.

    Source: Ma et al., PPCL, 2025, arXiv:2511.16156 (width pruning of the text stream).
    Differs: maps are trained by the outputs of the model; weights that nothing reads are dropped,
        where the released ones keep the layer behind the text's attention.
    Exact when: what attention reads of the stream, and what is left of it, are linear maps.
    """

    name: ClassVar[str] = "linearize-streams"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must train"}
    examples: ClassVar[tuple[Mapping[str, object], ...]] = ()
    groups: tuple[tuple[str, str], ...] = ()
    stream: int = 0
    epochs: int = 1
    rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.stream < 0:
            raise OptionError(f"{self.name}: stream={self.stream}; use 0 or more.")

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.CALIBRATED})

    def regions(self, program: Program) -> Iterator[BlockGroup]:
        blocks = {str(b.instance): b for b in program.blocks() if b.instance}
        order = list(blocks)
        free = set(order)
        for group in self.groups:
            for name in group:
                if name not in blocks:
                    raise OptionError(
                        f"{self.name}: there is no block {name!r} of its own in the model.",
                        remedy=f"use two of {', '.join(order[:3])}, ...",
                    )
            start, stop = map(order.index, group)
            names = order[start : stop + 1]
            if len(names) < 2 or not free.issuperset(names):
                raise OptionError(
                    f"{self.name}: the group {list(group)} has no second block, or another's.",
                    remedy="give first and last block of groups that do not overlap.",
                )
            free.difference_update(names)
            yield BlockGroup.of(program, [blocks[name] for name in names])

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[int]:
        for region in self.regions(program):
            if reason := region.objection(self.stream):
                raise OptionError(f"{self.name}: the group {reason}.", where=region.label)
        return super().plan(program)

    def decide(self, region: BlockGroup) -> int | Skip:
        return self.stream

    def replace(self, region: BlockGroup, decision: int) -> nn.Module:
        return WithoutStream(region, decision)

    def recovery(self, old: Program, new: Program, plan: Plan[int]) -> Sequence[Stage]:
        fits = [
            Fit(f"{name}.weight", f"{name}.bias", *ends)
            for region in self.regions(old)
            for name, ends in ends_of(region, plan.decisions[region.label]).items()
            if f"{name}.weight" in new.tensors
        ]
        return [
            Stage(
                name="linearize",
                weights=dict.fromkeys(n for fit in fits for n in (fit.weight, fit.bias)),
                loss=output_mse(old, new),
                fits=fits,
                epochs=self.epochs,
                rate=self.rate,
            )
        ]
