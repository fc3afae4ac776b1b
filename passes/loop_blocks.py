"""Run the middle of a stack as a loop: the same few blocks, again and again.

    pre -> 0 1 2 3 4 5 -> post          pre -> a b a b a b -> post

The loop is written out: calls of the same blocks over the same weights, as many as it has turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.facts import Fact
from ..ir.program import Program
from ..ir.recognize import Block
from ..ir.recognize.place import Place, made_at
from ..ir.recognize.stack import Stack
from ..ir.region_module import RegionModule
from .base import Evidence, Pass, Plan, Promise, Skip, require_choice, selected
from .shared.bypass import bypass, cannot_bypass
from .shared.recovery import Stage
from .shared.tying import common_weights, taught_back

STARTS = ("mean", "first", "middle")
Turn = list[str]


@dataclass(frozen=True, kw_only=True)
class LoopBlocks(Pass[Block, list[Turn]]):
    """Replace the middle of every stack by a loop over a few shared blocks.

    A decision lists what runs in the place of a block, each as the labels of the blocks whose mean
    its weights begin with: nothing, one block, or all turns that are left in the last place.

    Attributes:
        before: Blocks of a stack that stay before the loop.
        body: Blocks in the loop.
        after: Blocks that stay behind it.
        turns: Times the body runs; None for as often as it fits into the blocks it replaces, which
            leaves the depth as it was.
        start: Weights of the body: the `mean` of the blocks whose place it takes over the turns,
            or those of the `first` or `middle` turn.
        epochs: Times the calibration is gone through when the blocks, those around the loop among
            them, are trained back. Each turn learns from the block that is as far along.
        rate: Largest learning rate of that training.
        include: Glob patterns of blocks that may be looped over; a stack with others is left.
        exclude: Glob patterns of blocks that may not.

    Raises:
        OptionError: An option is out of range.

    Source: Gao et al., AlgoFormer, 2024, arXiv:2402.13572.
    Differs: converts a trained model and trains it back, where the paper trains from scratch;
        nothing is injected between turns (`models/algoformer.py` has that); the number of turns
        is fixed when compiling. Weights do not depend on it: compile again with other `turns` and
        `Recover(weights=...)`.
    Exact when: the blocks in the loop have equal weights and the depth stays.
    """

    name: ClassVar[str] = "loop-blocks"
    promise: ClassVar[Promise] = Promise.BEHAVIOUR_CHANGING
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.DISTINCT_BLOCKS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must average"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"before": 0, "after": 0},)
    before: int = 1
    body: int = 1
    after: int = 1
    turns: int | None = None
    start: str = "mean"
    epochs: int = 1
    rate: float = 1e-3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.name, "start", self.start, STARTS)
        counts = (self.before >= 0, self.after >= 0, self.body >= 1, self.epochs >= 1)
        if not all(counts) or (self.turns is not None and self.turns < 1) or self.rate <= 0:
            raise OptionError(
                f"{self.name}: before={self.before}, body={self.body}, after={self.after},"
                f" turns={self.turns}, epochs={self.epochs}, rate={self.rate}.",
                remedy="loop over one block or more, one turn or more, and train with a positive"
                " rate.",
            )

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.DISTINCT_BLOCKS, Fact.CALIBRATED})

    def plan(self, program: Program, evidence: Evidence | None = None) -> Plan[list[Turn]]:
        decisions: dict[str, list[Turn]] = {}
        skips: dict[str, str] = {}
        for stack in program.stacks():
            middle = stack.blocks[self.before : len(stack.blocks) - self.after]
            outside = {b.label for b in stack.blocks} - {b.label for b in middle}
            skips |= dict.fromkeys(outside, "is before or behind the loop")
            reason = self._reason(stack, middle)
            if reason:
                skips |= {block.label: reason for block in middle}
            else:
                decisions |= self._turns([block.label for block in middle])
        order = [block.label for block in program.blocks() if block.label in decisions]
        return Plan({label: decisions[label] for label in order}, skips)

    def decide(self, region: Block) -> list[Turn] | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        reason = cannot_bypass(region)
        return Skip(reason, at=region) if reason else [[region.label]]

    def replace(self, region: Block, decision: list[Turn]) -> nn.Module:
        if not decision:
            return bypass(region)
        turns = [RegionModule(region, common_weights(region, sources)) for sources in decision]
        return turns[0] if len(turns) == 1 else Turns(region, turns)

    def recovery(self, old: Program, new: Program, plan: Plan[list[Turn]]) -> Sequence[Stage]:
        return taught_back(
            old, new, _taught(old, plan), new.blocks(), name="loop", epochs=self.epochs,
            rate=self.rate,
        )  # fmt: skip

    def _reason(self, stack: Stack, middle: Sequence[Block]) -> str | None:
        """Say why a stack's middle cannot be a loop, or None."""
        if len(middle) <= self.body:
            return f"is one of {len(middle)} blocks, no more than the body of the loop"
        for index, block in enumerate(middle):
            model, place = middle[index % self.body], f"is in a loop with {block.label}"
            decision = self.decide(block)
            if isinstance(decision, Skip):
                return f"{place}, which {decision.reason}"
            if block.structure != model.structure:
                return f"{place}, which is not built like {model.label}"
            if _sides(stack.program, block) != _sides(stack.program, model):
                return f"{place}, which reads other values than {model.label}"
        return None

    def _turns(self, labels: Sequence[str]) -> dict[str, list[Turn]]:
        """Return what runs in the place of each block."""
        runs = (self.turns or len(labels) // self.body) * self.body
        sources = [self._sources(labels[start :: self.body]) for start in range(self.body)]
        order = [sources[index % self.body] for index in range(runs)]
        places = [[turn] for turn in order[: len(labels) - 1]] + [order[len(labels) - 1 :]]
        places += [[] for _ in range(len(labels) - len(places))]
        return dict(zip(labels, places, strict=True))

    def _sources(self, labels: Sequence[str]) -> Turn:
        if self.start == "mean":
            return list(labels)
        return [labels[0 if self.start == "first" else (len(labels) - 1) // 2]]


class Turns(nn.Module):
    """A block several times in a row; what is no stream is the same in every turn."""

    def __init__(self, block: Block, turns: Sequence[nn.Module]) -> None:
        super().__init__()
        self.turns = nn.ModuleList(turns)
        self.places = tuple(block.inputs.index(stream.stream_in) for stream in block.streams)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = list(inputs)
        for turn in self.turns:
            results = turn(*given)
            streams = results if isinstance(results, tuple) else (results,)
            for place, value in zip(self.places, streams, strict=True):
                given[place] = value
        return results


def _taught(old: Program, plan: Plan[list[Turn]]) -> dict[str, str]:
    """Return which block each place of the loop should be like: as far along as it is."""
    taught: dict[str, str] = {}
    for stack in old.stacks():
        labels = [block.label for block in stack.blocks if block.label in plan.decisions]
        runs = sum(len(plan.decisions[label]) for label in labels)
        done = 0
        for label in labels:
            done += len(plan.decisions[label])
            like = round(done * len(labels) / runs) - 1
            if plan.decisions[label] and like >= 0:
                taught[label] = labels[like]
    return taught


def _sides(program: Program, block: Block) -> list[object]:
    """Return what tells the values apart that a block reads beside its streams."""
    streams = {stream.stream_in for stream in block.streams}
    beside = (node for node in block.inputs if node not in streams)
    return [_traced(program, Place(block.instance, node)) for node in beside]


def _traced(program: Program, value: Place) -> object:
    """Return a value of the main graph itself; of a block, what it computes, and of what."""
    place = made_at(program, value)
    if place.instance is None:
        return place
    pending, leaves = [place.node], list[object]()
    for node in pending:  # grows while it is walked
        if node.op == "placeholder":
            leaves.append(made_at(program, Place(place.instance, node)))
        elif node.op == "get_attr":
            leaves.append(program.instances[place.instance].weights[str(node.target)])
        pending += [n for n in node.all_input_nodes if n not in pending]
    return place.node, *leaves
