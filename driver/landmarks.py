"""Every value of a captured program by its numbers, and those inside ops that hide some.

An attention that is one op here may be several nodes elsewhere, so what lies between its queries
and its result is computed too: scaled queries and keys, scores, capped scores, and the masks that
its constants stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.recognize.core import Core, cores_of
from ..ir.regions import local_path
from ..ir.run import run
from .fingerprint import Index
from .numerics import relative

_UNIT = 2.0**-24  # rounding of fp32
_SLACK = 8  # times the rounding of our own run


@dataclass(frozen=True)
class Known:
    """A value of ours.

    Attributes:
        node: What computes it.
        instance: Block instance it runs in; None in the main graph.
        part: Which of the values inside the node; empty for its result.
    """

    node: fx.Node
    instance: str | None
    part: str = ""

    def __str__(self) -> str:
        """Name the value in the model."""
        path = ".".join(filter(None, (self.instance, local_path(self.node))))
        place = f"{path} ({self.node.name})" if path else self.node.name
        return f"{self.part} of {place}" if self.part else place


def index_of(program: Program, inputs: Sequence[Tensor]) -> Index[Known]:
    """Run a program in fp32 and fp64 and enter every value, with how far rounding moves it."""
    before: list[Any] = []
    run(program, inputs, on_node=lambda _, __, value: before.append(value))
    rounded = iter(before)
    index: Index[Known] = Index()
    cores = {core.node: core for graph in program.graphs.values() for core in cores_of(graph)}
    seen: dict[fx.Node, Any] = {}

    def saw(instance: str | None, node: fx.Node, value: Any) -> None:
        own = next(rounded)
        seen[node] = value
        if isinstance(value, Tensor):
            index.add(Known(node, instance), value, _allowed(own, value))
        if node in cores:
            for part, inside in _inside(cores[node], seen):
                index.add(Known(node, instance, part), inside, _allowed(own, value))

    run(program, inputs, dtype=torch.float64, on_node=saw)
    return index


def _allowed(own: Any, exact: Tensor) -> float:
    if not isinstance(own, Tensor) or not own.is_floating_point():
        return _SLACK * _UNIT
    huge = own.abs() >= torch.finfo(torch.float32).max / 2
    return _SLACK * (relative(own.masked_fill(huge, 0), exact.masked_fill(huge, 0)) + _UNIT)


def _inside(core: Core, seen: dict[fx.Node, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the values between queries and result of an attention that is one op."""
    if core.spelled or core.scale is None or core.orders is not None:
        return
    query, key = seen[core.query], seen[core.key]
    yield "scaled queries", query * core.scale
    yield "scaled queries", query * math.sqrt(core.scale)
    yield "scaled keys", key * math.sqrt(core.scale)
    copies = query.shape[-3] // key.shape[-3] if key.dim() > 2 else 1
    scores = query @ key.repeat_interleave(copies, -3).transpose(-1, -2)
    yield "scores", scores
    yield "scaled scores", scores * core.scale
    if core.causal:
        yield "causal mask", torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
