"""Blocks that read one set of weights.

Weights of isomorphic blocks correspond one for one, whatever they are called. What several blocks
are to read is made once per program, so that it is one tensor wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.recognize import Block
from ...ir.recognize.stack import Stack
from .losses import balanced_features, output_mse
from .recovery import Stage
from .students import cuts_around, key_of

T = TypeVar("T")
_made: WeakKeyDictionary[Program, dict[Any, Any]] = WeakKeyDictionary()


def once(program: Program, key: Any, make: Callable[[], T]) -> T:
    """Return what `make` gives, made once as long as the program lives."""
    known = _made.setdefault(program, {})
    if key not in known:
        known[key] = make()
    return known[key]


def block_at(program: Program, label: str) -> Block:
    """Return a block by its label.

    Raises:
        OptionError: The program has no such block.
    """
    blocks = once(program, "blocks", lambda: {b.label: b for b in program.blocks()})
    if label not in blocks:
        raise OptionError(f"the program has no block {label!r}.")
    return blocks[label]


def weight_names(blocks: Iterable[Block]) -> list[str]:
    """Name the floating-point parameters that blocks read, each once."""
    found: dict[str, None] = {}
    for block in blocks:
        program = block.program
        for name in map(block.tensor_name, block.weight_nodes):
            if name in program.parameters and program.tensors[name].is_floating_point():
                found[name] = None
    return list(found)


def common_weights(
    block: Block, sources: Sequence[str], private: Collection[fx.Node] = ()
) -> Mapping[fx.Node, Tensor]:
    """Return the weights that a block reads in common with others.

    Args:
        block: Where they are read.
        sources: Labels of isomorphic blocks: of one its own weights, of several their mean.
        private: `get_attr` nodes whose weights stay the block's own.

    Returns:
        Tensors by `get_attr` node, one tensor for all blocks with the same sources.
    """
    program = block.program
    whole = once(program, ("mean", *sources), lambda: _mean(program, sources))
    nodes = zip(block.weight_nodes, whole, strict=True)
    return {node: tensor for node, tensor in nodes if node not in private}


def taught_back(
    old: Program, new: Program, taught: Mapping[str, str], trained: Iterable[Block], **how: Any
) -> list[Stage]:
    """Return the stage that trains blocks towards what blocks gave before.

    The loss is that of the outputs and of the streams behind the blocks that are taught.

    Args:
        old: The teacher.
        new: The student.
        taught: Labels of the student's blocks as the old program names them, each with that of the
            block it should be like.
        trained: Blocks of the new program whose weights are trained.
        how: Other attributes of the stage.
    """
    student, teacher = cuts_around(new), cuts_around(old)
    both = [
        (ours, theirs)
        for label, like in taught.items()
        for ours, theirs in zip(
            student[key_of(block_at(old, label))][1],
            teacher[key_of(block_at(old, like))][1],
            strict=True,
        )
        if ours and theirs
    ]
    weights = dict.fromkeys(weight_names(trained))
    loss = balanced_features(output_mse(old, new), [a for a, _ in both], [b for _, b in both])
    return [Stage(weights=weights, loss=loss, **how)] if weights else []


def own_nodes(block: Block) -> set[fx.Node]:
    """Return the `get_attr` nodes of a block's norms and of its modulation."""
    norms = [
        norm
        for sublayer in block.sublayers
        for way in sublayer.ways
        for norm in (way.norm_before, way.norm_after, way.norm_of_sum)
        if norm is not None
    ]
    regions = [*norms, *([block.modulation] if block.modulation else [])]
    inside = {node for region in regions for node in region.nodes}
    return {n for node in inside for n in node.all_input_nodes if n.op == "get_attr"}


def alike(stack: Stack) -> Iterator[list[Block]]:
    """Yield the blocks of a stack that are isomorphic, in execution order."""
    kinds: dict[str, list[Block]] = {}
    for block in stack.blocks:
        kinds.setdefault(block.structure, []).append(block)
    yield from kinds.values()


def _mean(program: Program, sources: Sequence[str]) -> list[Tensor]:
    blocks = [block_at(program, label) for label in sources]
    columns = zip(*(map(b.tensor, b.weight_nodes) for b in blocks), strict=True)
    return [mean(list(column)) for column in columns]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors; one of them, bit by bit, where all are equal."""
    first, *others = tensors
    if all(other is first or torch.equal(other, first) for other in others):
        return first
    if not first.is_floating_point():
        return first
    total = sum((other.double() - first.double() for other in others), torch.zeros(()))
    return (first.double() + total / len(tensors)).to(first.dtype)
