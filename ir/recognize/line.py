"""The line of a model: all its blocks one after the other, over the joints between stacks.

    double block 1 -> ... -> double block 19 -> [text, image] -> single block 1 -> ... -> image

Stacks follow each other where the second begins with what the first has left.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..graphs import aten
from ..program import Program
from .chain import Chain, Values, in_main
from .stack import Stack


def line_of(program: Program) -> Chain | None:
    """Return the longest run of blocks of a program as a chain; None where there is none in main.

    A stage is a block, and what joins its stack to the one before. Streams that have ended are left
    out, so values of a chain differ in number.
    """
    lines: list[list[Values]] = []
    for stack in program.stacks():
        values = _cuts(stack)
        if not values:
            continue
        joined = bool(lines) and _leads_to(lines[-1][-1], values[0])
        if joined:
            lines[-1] += values[1:]
        else:
            lines.append(values)
    chains = [Chain(tuple(values), "block", program) for values in lines]
    return max(chains, key=lambda chain: chain.length, default=None)


def read_part(node: fx.Node) -> fx.Node:
    """Return the part of a value that is all that is read of it: the image of [text, image]."""
    while len(node.users) == 1:
        (reader,) = node.users
        if getattr(reader.target, "overloadpacket", None) is not aten.slice:
            break
        node = reader
    return node


def _cuts(stack: Stack) -> list[Values]:
    """Return the streams before each block and after the last; empty unless all are in main.

    Streams that end in the stack come last.
    """
    values: list[Values] = []
    order = sorted(range(len(stack.ends)), key=lambda stream: stack.ends[stream] is not None)
    for cut in stack.cuts:
        places = [place for stream in order if (place := cut[stream]) is not None]
        nodes = [in_main(stack.program, place) for place in places]
        values.append(tuple(node for node in nodes if node is not None))
        if not nodes or None in nodes:
            return []
    return values


def _leads_to(ends: Sequence[fx.Node], starts: Sequence[fx.Node]) -> bool:
    """Whether streams are made of the ends of others."""
    seen, pending = set[fx.Node](), list(starts)
    for node in pending:  # grows while it is walked
        if node in ends:
            return True
        new = [n for n in node.all_input_nodes if n not in seen and n.op != "get_attr"]
        seen.update(new)
        pending += new
    return False
