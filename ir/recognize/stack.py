"""Stacks: runs of blocks, each of which reads what the one before has left.

A stack goes on as long as every stream of a block continues one stream of the block before. It
ends where streams are joined (FLUX, before its single blocks), where something else computes on
them (a Swin merges patches: one stack per stage), and with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graphs import common_prefix
from ..program import Program
from ..shapes import concrete
from .block import Block
from .group import period_of
from .path import value_of
from .place import Place, made_at, sources_of
from .work import Work, work_of


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks.

    Attributes:
        blocks: In execution order.
        cuts: The streams before each block, and after the last: None for one that has ended. With
            the values of `cuts[i]`, blocks from i on need nothing of the blocks before, unless
            they read more than streams of them.
        program: Where it was found.
    """

    blocks: tuple[Block, ...]
    cuts: tuple[tuple[Place | None, ...], ...]
    program: Program

    @property
    def label(self) -> str:
        """Module path of the blocks."""
        return common_prefix(block.label for block in self.blocks)

    @property
    def structures(self) -> tuple[str, ...]:
        """Structure of each block."""
        return tuple(block.structure for block in self.blocks)

    @property
    def period(self) -> int:
        """How many blocks repeat as a unit; all of them if they do not repeat.

        Masks count, which blocks of one structure may be given different ones of.
        The first and the last block may differ: nothing comes before the one, and streams may end
        in the other.
        """
        keys = [(b.structure, str([a.constants() for a in b.attentions])) for b in self.blocks]
        inner = period_of(keys[1:-1]) if len(keys) > 3 else None
        return period_of(keys) or inner or len(keys)

    @property
    def ends(self) -> tuple[int | None, ...]:
        """The block in which each stream ends, counted from 0; None for those that go on."""
        ended: list[int | None] = []
        for stream in range(len(self.cuts[0])):
            there = [cut[stream] is not None for cut in self.cuts]
            ended.append(None if there[-1] else there.index(False) - 1)
        return tuple(ended)

    def costs(self, sizes: Mapping[str, int] | None = None) -> tuple[Work, ...]:
        """Return parameters and FLOPs of each block, once per class of blocks.

        Args:
            sizes: Size of dynamic dimensions by name; those left out are as in the example inputs.
        """
        known: dict[tuple[fx.Node, ...], Work] = {}
        size = concrete(self.program, sizes)
        for block in self.blocks:
            if block.nodes not in known:
                known[block.nodes] = work_of(block, size)
        return tuple(known[block.nodes] for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "label": self.label,
            "blocks": [block.label for block in self.blocks],
            "structures": list(self.structures),
            "period": self.period,
            "ends": list(self.ends),
            "costs": [work.to_json() for work in self.costs()],
        }


def stacks_of(program: Program) -> list[Stack]:
    """Return the stacks of a program, in the order of their first blocks."""
    blocks = program.blocks()
    made = {
        _at(program, block, stream.stream_out): (index, number)
        for index, block in enumerate(blocks)
        for number, stream in enumerate(block.streams)
        if stream.stream_out is not None
    }
    before = [_before(program, block, made) for block in blocks]
    runs: list[list[int]] = []
    run_of: dict[int, list[int]] = {}
    for index, link in enumerate(before):
        run = run_of.get(link[0]) if link else None
        if run is None or run[-1] != link[0]:  # type: ignore[index]
            run = []
            runs.append(run)
        run.append(index)
        run_of[index] = run
    return [_stack(program, blocks, before, run) for run in runs]


Link = tuple[int, tuple[int, ...]] | None


def _at(program: Program, block: Block, node: fx.Node) -> Place:
    return made_at(program, Place(block.instance, value_of(node)))


def _before(program: Program, block: Block, made: Mapping[Place, tuple[int, int]]) -> Link:
    """Return the block before one, and which of its streams each stream continues."""
    found: list[tuple[int, int]] = []
    for stream in block.streams:
        place = Place(block.instance, stream.stream_in)
        sources = list(dict.fromkeys(sources_of(program, place, set(made))))
        if len(sources) != 1:
            return None
        found.append(made[sources[0]])
    (one, *rest) = found
    if any(index != one[0] for index, _ in rest) or len(set(found)) < len(found):
        return None
    return one[0], tuple(number for _, number in found)


def _stack(
    program: Program, blocks: Sequence[Block], before: Sequence[Link], run: Sequence[int]
) -> Stack:
    """Return a stack, the streams of its cuts in the order of its first block."""
    chain = [blocks[index] for index in run]
    order = list(range(len(chain[0].streams)))  # of the current block, the stream in each lane
    cuts: list[tuple[Place | None, ...]] = []
    lanes: list[int | None] = list(order)
    for index, block in zip(run, chain, strict=True):
        link = before[index]
        if cuts and link is not None:
            lanes = [link[1].index(n) if n in link[1] else None for n in lanes]
        starts = [None if n is None else block.streams[n].stream_in for n in lanes]
        cuts.append(_places(program, block, starts))
    last = chain[-1]
    ends = [None if n is None else last.streams[n].stream_out for n in lanes]
    cuts.append(_places(program, last, ends))
    return Stack(tuple(chain), tuple(cuts), program)


def _places(
    program: Program, block: Block, nodes: Sequence[fx.Node | None]
) -> tuple[Place | None, ...]:
    return tuple(
        None if node is None else made_at(program, Place(block.instance, node)) for node in nodes
    )
