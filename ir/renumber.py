"""Number the blocks that are left, as a model of fewer blocks has them.

blocks.0, blocks.1, blocks.4, blocks.5   ->   blocks.0, blocks.1, blocks.2, blocks.3
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .graphs import common_prefix
from .program import Program
from .recognize import Block


def renumbered(program: Program, names: Iterable[str]) -> dict[str, str]:
    """Return what names of tensors are in a model whose blocks have no gaps.

    Numbers change in lists of modules that hold the blocks of a stack, and in no others. What has
    no tensors in such a list is not seen, and counts as a gap.

    Args:
        program: Where the blocks are.
        names: All there are, aliases too.
    """
    split = {name: name.split(".") for name in names}
    for path in dict.fromkeys(_lists(program)):
        depth = len(path)
        inside = [parts for parts in split.values() if _is_below(parts, path)]
        taken = sorted({int(parts[depth]) for parts in inside})
        for parts in inside:
            parts[depth] = str(taken.index(int(parts[depth])))
    return {name: ".".join(parts) for name, parts in split.items()}


def _lists(program: Program) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the lists of modules that the blocks of stacks are in."""
    for stack in program.stacks():
        paths = [found for block in stack.blocks if (found := _path(block))]
        path = tuple(filter(None, common_prefix(paths).split(".")))
        if len(set(paths)) == 1:  # a block alone: what differed between blocks was a number
            numbers = [index for index, part in enumerate(path) if part.isdecimal()]
            path = path[: numbers[-1]] if numbers else path
        if paths and all(_is_below(found.split("."), path) for found in paths):
            yield path


def _path(block: Block) -> str:
    """Return the path of the module that holds the weights of a block, shared ones apart."""
    read = dict.fromkeys(source for node in block.nodes for source in node.all_input_nodes)
    return common_prefix(
        block.tensor_name(node)
        for node in read
        if node.op == "get_attr" and not block.is_shared(node)
    )


def _is_below(parts: Sequence[str], path: tuple[str, ...]) -> bool:
    """Whether a name is that of a numbered member of a list, or of something in it."""
    depth = len(path)
    return tuple(parts[:depth]) == path and len(parts) > depth and parts[depth].isdecimal()
