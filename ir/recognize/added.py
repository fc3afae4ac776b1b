"""Sublayers with all that hangs on them: from a stream to the stream behind the addition.

y = x + gate * attention(norm(x) * (1 + scale) + shift)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import fx

from ..program import Program
from ..regions import Region, unique_paths
from .attention import Attention
from .flow import flow_of
from .sublayer import Sublayer, sublayers_of


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedAttention(Region):
    """Attention on one stream, with its norms, modulation, gate and addition.

    Attributes:
        attention: What is added.
        stream: What it is added to; one of the inputs, unless the region computes it itself.
        sublayer: How it hangs on the stream.
    """

    attention: Attention
    stream: fx.Node
    sublayer: Sublayer
    kind: ClassVar[str] = "added attention"

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        bound.__dict__["attention"] = self.attention.bind(program, graph, instance)
        bound.__dict__["sublayer"] = self.sublayer.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return one region per attention that is added to the one stream it reads."""
        flow = flow_of(graph)
        found = []
        for sublayer in sublayers_of(graph):
            attention = sublayer.region
            if isinstance(attention, Attention) and len(sublayer.residuals) == 1 and sublayer.ways:
                way = sublayer.residual
                inside = {*attention.nodes, *way.nodes, way.total}
                parts = flow.enclose(inside, way.total)
                found.append((attention, way.stream, sublayer, parts))
        paths = unique_paths([attention.path for attention, *_ in found])
        return [
            cls(path=path, attention=attention, stream=stream, sublayer=sublayer, **parts)
            for path, (attention, stream, sublayer, parts) in zip(paths, found, strict=True)
        ]
