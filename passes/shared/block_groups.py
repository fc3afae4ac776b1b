"""Blocks in groups, of which a router chooses: who is in one, and how groups are trained."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir.branches import branches_of, choices, operands_of
from ...ir.errors import OptionError
from ...ir.graphs import argument_positions, aten, output_nodes
from ...ir.program import Program
from ...ir.recognize import Block
from ...ir.recognize.chain import Chain, Stages, Values, blocks_of
from ...ir.recognize.place import Place, made_at
from ...ir.recognize.stack import Stack
from ...ir.regions import local_path
from ..base import selected
from .losses import TINY
from .recovery import Loss, Stage
from .students import cuts_around, key_of
from .tying import block_at, weight_names

Span = tuple[int, int]
CAUSAL = {"causal", "window"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped(Stages):
    """A block of a stack, in the main graph, and the group it is in.

    Attributes:
        group: Labels of the blocks of its group; empty without one.
        place: Its place among them.
        start: The streams before the group; the last inputs hold those the block does not read.
        told: What modulates the first block of the group, [batch, ..., dim], if anything does.
        objection: Why it is in no group, completing "the block ..."; None when it is in one.
    """

    group: tuple[str, ...]
    place: int
    start: Values
    told: Values
    objection: str | None
    kind: ClassVar[str] = "block"

    @property
    def read(self) -> Values:
        """What the router of the group reads."""
        return (*self.start, *self.told)


def grouped(
    program: Program,
    groups: int | Sequence[Span],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    by: str,
) -> Iterator[Grouped]:
    """Yield the blocks of a program, in execution order.

    Args:
        program: Where they are.
        groups: How many blocks in a row make a group; or first and last of each group, counted from
            0 over the whole program.
        include: Glob patterns of blocks that may be in a group.
        exclude: Glob patterns of those that may not.
        by: Name of the pass, for errors.

    Raises:
        OptionError: Groups overlap, lie across stacks, or there are no such blocks.
    """
    labels = [block.label for block in program.blocks()]
    spans = () if isinstance(groups, int) else _checked(groups, len(labels), by)
    for stack in program.stacks():
        names = [block.label for block in stack.blocks]
        if isinstance(groups, int):
            starts = range(0, len(names) - groups + 1, groups)
            members = [tuple(range(first, first + groups)) for first in starts]
        else:
            members = [m for span in spans if (m := _within(span, labels, names, by))]
        chain = _chain(stack)
        owner = {index: group for group in members for index in group}
        for index, block in enumerate(stack.blocks):
            group = owner.get(index, ())
            reason = _objection(stack, chain, group, include, exclude)
            yield _region(stack, chain, index, group, reason) if chain else _alone(block, reason)


def taught_groups(
    old: Program, new: Program, groups: Sequence[Sequence[str]], *, epochs: int, rate: float
) -> list[Stage]:
    """Return the stage that trains routers and blocks of groups to what the groups gave before.

    Args:
        old: The teacher.
        new: The student.
        groups: Labels of the blocks of each group, as the old program names them.
        epochs: Of the stage.
        rate: Of the stage.
    """
    if not groups:
        return []
    known, ends = {local_path(node): node for node in choices(new.main)}, cuts_around(old)
    loss = reduce(
        operator.add,
        [
            group_error(
                [known[label] for label in group],
                new,
                ends[key_of(block_at(old, group[-1]))][1],
            )
            for group in groups
        ],
    )
    blocks = [block_at(old, label) for group in groups for label in group]
    routers = [name for name in new.tensors if name not in old.tensors]
    weights = dict.fromkeys([*routers, *weight_names(blocks)])
    return [Stage(name="groups", weights=weights, loss=loss, epochs=epochs, rate=rate)]


def group_error(chosen: Sequence[fx.Node], new: Program, end: Sequence[Place | None]) -> Loss:
    """Return the squared error behind a group, relative to the teacher's streams.

    Scores get a gradient as if each scaled what its block adds, which is taken to reach the end of
    the group unchanged.

    Args:
        chosen: The choices that compute the blocks or not, in order.
        new: Where they are.
        end: The teacher's streams behind the group.
    """
    after = [{user.args[1]: user for user in node.users} for node in chosen]
    lanes = [i for i, place in enumerate(end) if place is not None and i in after[-1]]
    before = [_given(new, node) for node in chosen]
    scores = _scores(chosen[0])
    streams = [[(old[i], new_[i]) for i in lanes] for old, new_ in zip(before, after, strict=True)]
    places = [Place(None, node) for row in streams for pair in row for node in pair]
    width = 2 * len(lanes)

    def measure(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        share, values = ours[0].softmax(dim=-1), ours[1:]  # [batch, blocks]
        gates = share / share.detach()
        total = share.new_zeros(())
        for lane, wanted in enumerate(theirs):
            x = values[width * (len(chosen) - 1) + 2 * lane + 1]
            for number in range(len(chosen)):
                at = width * number + 2 * lane
                added = (values[at + 1] - values[at]).detach()
                x = x + (gates[:, number].view(-1, *[1] * (x.dim() - 1)) - 1) * added
            total = total + relative_error(x, wanted)
        return total

    wanted = tuple(place for i in lanes if (place := end[i]) is not None)
    return Loss((Place(None, scores), *places), wanted, measure)


def relative_error(ours: Tensor, theirs: Tensor) -> Float[Tensor, ""]:
    """Return the mean squared error over the mean square of what is wanted."""
    wanted = theirs.float()
    return F.mse_loss(ours.float(), wanted) / wanted.square().mean().clamp_min(TINY)


def _checked(groups: Sequence[Span], count: int, by: str) -> Sequence[Span]:
    known: set[int] = set()
    for first, last in groups:
        span = range(first, last + 1)
        if first < 0 or last >= count or not known.isdisjoint(span):
            raise OptionError(
                f"{by}: the group {[first, last]} has blocks of another group, or does not lie"
                f" within the {count} blocks of the model.",
                remedy="count blocks from 0 over the whole model, each in one group.",
            )
        known.update(span)
    return groups


def _within(
    span: Span, labels: Sequence[str], names: Sequence[str], by: str
) -> tuple[int, ...] | None:
    """Return the places in a stack of the blocks of a group; None where it is not in the stack.

    Raises:
        OptionError: Some of the group are in the stack, and some are not.
    """
    group = labels[span[0] : span[1] + 1]
    found = tuple(names.index(label) for label in group if label in names)
    if found and len(found) < len(group):
        raise OptionError(
            f"{by}: the group {list(span)} lies across stacks.",
            where=f"{group[0]} to {group[-1]}",
            remedy="end it where the stack does; `blockwright inspect` shows stacks.",
        )
    return found or None


def _chain(stack: Stack) -> Chain | None:
    """Return the chain of a stack's streams, up to where one of them ends."""
    going = [None not in cut for cut in stack.cuts]
    count = going.index(False) - 1 if False in going else len(stack.blocks)
    cut = Stack(stack.blocks[:count], stack.cuts[: count + 1], stack.program)
    return blocks_of(cut) if count > 0 else None


def _objection(
    stack: Stack,
    chain: Chain | None,
    group: Sequence[int],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Say why a block is in no group, or None."""
    blocks = [stack.blocks[index] for index in group]
    if not group:
        return "is in no group: fewer blocks are left than make one"
    if chain is None:
        return "is in a stack whose streams change their shape"
    if group[-1] >= chain.length:
        return "is in a group in which a stream ends"
    if any(not selected(block.label, include, exclude) for block in blocks):
        return "is in a group with a block that is excluded by pattern"
    if any(CAUSAL.intersection(a.mask.split("+")) for block in blocks for a in block.attentions):
        return "attends to the past alone, and the mean over all tokens would tell it the future"
    if any(len(node.meta["val"].shape) < 3 for node in chain.values[group[0]]):
        return "has streams without a batch or without tokens"
    if any(not _is_one(node.meta["val"].shape[0]) for node in chain.values[group[0]]):
        return "is chosen for one sample, and the program takes several: capture it with one"
    return None


def _is_one(size: Any) -> bool:
    """Whether a size is always one; a symbol is not asked, which would settle it."""
    return isinstance(size, int) and size == 1


def _region(
    stack: Stack, chain: Chain, index: int, group: Sequence[int], reason: str | None
) -> Grouped:
    """Return a block as a stage of a chain that also reads what its group's router does."""
    block = stack.blocks[index]
    if reason is not None:
        return _alone(block, reason)
    start = chain.values[group[0]]
    told = _condition(stack.program, stack.blocks[group[0]])
    before = chain.values[index]
    extra = [node for node in (*start, *told) if node not in before]
    stage = chain.stages(index + 1, index + 1, extra)
    known = {f.name: getattr(stage, f.name) for f in fields(stage)}
    return Grouped(
        **{**known, "path": block.label},
        group=tuple(stack.blocks[i].label for i in group),
        place=group.index(index),
        start=start,
        told=told,
        objection=None,
    )


def _alone(block: Block, reason: str | None) -> Grouped:
    names = ("path", "nodes", "inputs", "outputs", "graph", "instance", "program")
    known: Mapping[str, Any] = {name: getattr(block, name) for name in names}
    return Grouped(
        **known, before=(), first=0, last=0, length=0, group=(), place=0, start=(), told=(),
        objection=reason,
    )  # fmt: skip


def _condition(program: Program, block: Block) -> Values:
    """Return the vector that modulates a block, as main has it, if there is one."""
    for node in block.modulation.conditions if block.modulation else ():
        place = made_at(program, Place(block.instance, node))
        value = place.node.meta.get("val")
        if place.node.graph is program.main and isinstance(value, Tensor):
            if value.is_floating_point() and value.dim() >= 2 and value.numel() == value.shape[-1]:
                return (place.node,)
    return ()


def _given(program: Program, choice: fx.Node) -> list[fx.Node]:
    """Return what a choice returns when it computes nothing."""
    other = program.graphs[branches_of(choice)[1]]
    places = argument_positions(other)
    return [operands_of(choice)[places[node]] for node in output_nodes(other)]


def _scores(choice: fx.Node) -> fx.Node:
    """Return the scores that a choice goes by."""
    node = choice.all_input_nodes[0]
    while node.target is not aten.topk.default:
        node = node.all_input_nodes[0]
    return node.all_input_nodes[0]
