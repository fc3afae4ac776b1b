"""Blocks that stand for several: what is taught to them, and where their weights start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir.program import Program
from ...ir.recognize import Block
from ...ir.recognize.place import Place
from ...ir.region_module import RegionModule
from ...ir.regions import Region
from .losses import TINY, Distance, direction_l1, direction_mse, pairs
from .recovery import Loss

Cut = tuple[Place | None, ...]
Feeds = list[tuple[Place, Place]]
DISTANCES: Mapping[str, Distance] = {
    "direction_mse": direction_mse,
    "direction_l1": direction_l1,
    "mse": F.mse_loss,
}


def key_of(block: Block) -> str:
    """Return what a block is called before and after a rewrite: labels follow what is inside."""
    return block.instance or block.label


def cuts_around(program: Program) -> dict[str, tuple[Cut, Cut]]:
    """Return the streams before and after each block, by its key."""
    return {
        key_of(block): (stack.cuts[index], stack.cuts[index + 1])
        for stack in program.stacks()
        for index, block in enumerate(stack.blocks)
    }


def taught(
    old: Program, new: Program, runs: Sequence[tuple[str, str, str]], distance: Distance
) -> tuple[Loss, Feeds]:
    """Return how far students are from the runs of blocks they stand for, and what they read.

    Args:
        old: The teacher.
        new: The program with the students.
        runs: Per student, labels of the first and last block of the run, and of the student.
        distance: Of a value of the student to the teacher's.

    Returns:
        The sum over students and streams, and the student's inputs with the teacher's values.
    """
    teacher, student = cuts_around(old), cuts_around(new)
    ours: list[Place] = []
    theirs: list[Place] = []
    feeds: Feeds = []
    names = {block.label: key_of(block) for block in old.blocks()}
    for run in runs:
        first, last, label = (names[part] for part in run)
        if label not in student:  # no block any more: it is left as it starts
            continue
        (before, after), (start, end) = student[label], (teacher[first][0], teacher[last][1])
        feeds += [(a, b) for a, b in zip(before, start, strict=True) if a and b]
        both = [(a, b) for a, b in zip(after, end, strict=True) if a and b]
        ours += [a for a, _ in both]
        theirs += [b for _, b in both]
    return pairs(ours, theirs, distance), feeds


def blocks_with(program: Program, regions: Iterable[Region]) -> list[str]:
    """Return the labels of the blocks that regions lie in, each once."""
    owner = {(b.instance, node): b.label for b in program.blocks() for node in b.nodes}
    found = (owner.get((region.instance, region.nodes[0])) for region in regions)
    return list(dict.fromkeys(label for label in found if label))


def with_length(distance: Distance, weight: float) -> Distance:
    """Return a distance plus the weighted error of vectors' lengths, relative to the teacher's."""

    def both(ours: Tensor, theirs: Tensor) -> Tensor:
        lengths = ours.norm(dim=-1) / theirs.norm(dim=-1).clamp_min(TINY)
        return distance(ours, theirs) + weight * (lengths - 1).square().mean()

    return both if weight else distance


def own_weights(program: Program, block: Block) -> dict[fx.Node, str]:
    """Return the parameters that only this block reads, by the node that does."""
    names = {node: block.tensor_name(node) for node in block.weight_nodes}
    return {
        node: name
        for node, name in names.items()
        if name in program.parameters
        and program.tensors[name].is_floating_point()
        and not program.is_shared(str(node.target), block.instance)
    }


def average(blocks: Sequence[Block]) -> RegionModule:
    """Return the first of some isomorphic blocks with the mean of the weights of all."""
    first, program = blocks[0], blocks[0].program
    tensors: Mapping[fx.Node, list[Tensor]] = {
        node: [program.tensors[name]] for node, name in own_weights(program, first).items()
    }
    for block in blocks[1:]:
        for values, name in zip(
            tensors.values(), own_weights(program, block).values(), strict=True
        ):
            values.append(program.tensors[name])
    means = {node: torch.stack(values).mean(0) for node, values in tensors.items()}
    return RegionModule(first, means)
