"""Find the blocks of a model that differ in their weights alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .blueprint import Number, Survey, survey, walk

FEWEST = 6  # equal blocks in one list below which a model is captured flat


class Member(NamedTuple):
    """A block of a group: where it is, and how it is built."""

    path: str
    block: nn.Module
    built: Survey


class Group(NamedTuple):
    """Equal blocks of one list, in order.

    Attributes:
        members: The blocks; the first is the one that will run.
        numbering: Integers of the first that are another one in every block.
    """

    members: Sequence[Member]
    numbering: Sequence[Number]


def find_repeats(model: nn.Module) -> list[Group]:
    """Return groups of equal blocks, none inside another.

    They are siblings in one container, have no hooks, hold attributes that can be read, and share
    no module with each other or the rest of the model.
    """
    users = Counter(c for m in walk(model) for c in m._modules.values() if c is not None)
    shared = {module for module, count in users.items() if count > 1}
    seen: dict[int, object] = {}
    found: list[Group] = []
    looked_at: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        looked_at.add(module)
        below = [(f"{path}.{n}".strip("."), c) for n, c in module._modules.items() if c is not None]
        grouped: set[nn.Module] = set()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(below) >= FEWEST:
            groups = _groups([Member(p, block, survey(block, seen)) for p, block in below], shared)
            grouped = {member.block for group in groups for member in group.members}
            found += groups
        stack += [(p, c) for p, c in reversed(below) if c not in grouped | looked_at]
    return found


def _groups(members: Sequence[Member], shared: set[nn.Module]) -> list[Group]:
    """Sort the blocks of a container by how they are built."""
    alike: dict[object, list[Member]] = {}
    for member in members:
        if member.built.plain and "forward" not in vars(member.block):
            if not (shared and shared & walk(member.block).keys()):
                alike.setdefault(member.built.key, []).append(member)
    return [group for equal in alike.values() for group in _split(equal) if len(group[0]) >= FEWEST]


def _split(equal: Sequence[Member]) -> list[Group]:
    """Split equal blocks by their integers, those apart that number the blocks."""
    rows = [[number.value for number in member.built.numbers] for member in equal]
    numbering = {i for i, column in enumerate(zip(*rows)) if len(set(column)) == len(rows) > 1}  # noqa: B905
    by_rest: dict[tuple[int, ...], list[Member]] = {}
    for member, row in zip(equal, rows, strict=True):
        rest = tuple(value for i, value in enumerate(row) if i not in numbering)
        by_rest.setdefault(rest, []).append(member)
    return [
        Group(group, [group[0].built.numbers[i] for i in sorted(numbering)])
        for group in by_rest.values()
    ]
