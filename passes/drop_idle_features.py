"""Drop output features of linear layers that nobody reads.

    a, b, _ = split(x @ W.T)                   W: [3 * dim, ...]
    a, b    = split(x @ W[: 2 * dim].T)

Passes that take out a sublayer leave such features behind: those of a modulation that made shift,
scale and gate for it, or those of a fused projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..ir.facts import Fact
from ..ir.recognize.idle import IdleFeatures
from .base import Pass, Promise, Skip, selected

Part = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DropIdleFeatures(Pass[IdleFeatures, list[Part]]):
    """Narrow linear layers to the features that are read.

    Attributes:
        include: Glob patterns of layers to narrow.
        exclude: Glob patterns of layers to leave alone.

    Source: dead-code elimination, Aho et al., Compilers, 2006, section 9.1, on rows of a matrix.
    Exact when: always, up to the order of summation inside the matrix product.
    """

    name: ClassVar[str] = "drop-idle-features"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must cut"}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def decide(self, region: IdleFeatures) -> list[Part] | Skip:
        if not selected(region.label, self.include, self.exclude):
            return Skip("is excluded by pattern", at=region)
        if region.linear.weight_is_shared:
            return Skip("shares its weight with another place", at=region)
        if any(shape_of(region, node).count(-1) > 1 for node in region.outputs):
            return Skip("is cut up in a way that is not followed", at=region)
        return runs(region.live)

    def replace(self, region: IdleFeatures, decision: list[Part]) -> nn.Module:
        rows = torch.tensor([row for part in decision for row in range(*part)])
        starts = [int((rows == start).nonzero()) for start, _ in region.parts]
        pieces = [
            Piece(first, stop - start, shape_of(region, node))
            for first, (start, stop), node in zip(starts, region.parts, region.outputs, strict=True)
        ]
        weight, bias = region.linear.weight, region.linear.bias
        return NarrowLinear(
            take(weight, decision), None if bias is None else take(bias, decision), pieces
        )


@dataclass(frozen=True)
class Piece:
    """A part of a layer's output.

    Attributes:
        start: Its first feature.
        length: How many.
        shape: Shape it is given, -1 for a dynamic size; empty where it has its shape already.
    """

    start: int
    length: int
    shape: tuple[int, ...]


class NarrowLinear(nn.Module):
    """A linear layer whose output comes in parts."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.pieces = tuple(pieces)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        y = F.linear(x, self.weight, self.bias)
        parts = [(y.narrow(-1, p.start, p.length), p.shape) for p in self.pieces]
        found = [part.reshape(shape) if shape else part for part, shape in parts]
        return tuple(found) if len(found) > 1 else found[0]


def shape_of(region: IdleFeatures, node: fx.Node) -> tuple[int, ...]:
    """Return the shape that makes a part of the layer's output the value of a node.

    Dynamic sizes are -1; it is empty where there is nothing to do.
    """
    (layer,) = region.linear.outputs
    *outer, width = node.meta["val"].shape
    start, stop = region.parts[region.outputs.index(node)]
    if str(outer) == str(list(layer.meta["val"].shape[:-1])) and width == stop - start:
        return ()
    return tuple(size if isinstance(size, int) else -1 for size in (*outer, width))


def runs(rows: Sequence[int]) -> list[Part]:
    """Return rows in order as ranges (start, stop)."""
    found: list[Part] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found


def take(tensor: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return some rows of a weight or bias."""
    return torch.cat([tensor[slice(*part)] for part in parts])
