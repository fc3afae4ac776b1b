"""A region of its own: what a pass looks at when none of blockwright's regions is it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import fx

from blockwright.ir.recognize import Linear, Norm
from blockwright.ir.regions import Region


@dataclass(frozen=True, kw_only=True, eq=False)
class NormedLinears(Region):
    """A layer or RMS norm over the last axis, and every linear layer that reads it.

    One output per layer, and one more, the norm itself, where something else reads it too.

    Attributes:
        found_norm: The norm, as found in the graph.
        found_linears: The layers, in execution order.
    """

    found_norm: Norm
    found_linears: tuple[Linear, ...]
    kind: ClassVar[str] = "normed_linears"

    @property
    def norm(self) -> Norm:
        """The norm as this instance has it."""
        return self.found_norm.bind(self.program, self.graph, self.instance)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The layers as this instance has them."""
        return tuple(
            linear.bind(self.program, self.graph, self.instance) for linear in self.found_linears
        )

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return every norm that some linear layer reads, in execution order."""
        linears = Linear.find(graph)
        found = []
        for norm in Norm.find(graph):
            result = norm.outputs[0]
            behind = tuple(linear for linear in linears if linear.inputs[0] is result)
            width = result.meta["val"].shape[-1]
            if behind and norm.form in ("layer_norm", "rms_norm") and norm.size == width:
                found.append(cls._of(norm, behind))
        return found

    @classmethod
    def _of(cls, norm: Norm, linears: tuple[Linear, ...]) -> Self:
        result = norm.outputs[0]
        inside = {linear.nodes[0] for linear in linears}
        others = () if inside.issuperset(result.users) else (result,)
        return cls(
            path=norm.path,
            nodes=(*norm.nodes, *(linear.nodes[0] for linear in linears)),
            inputs=norm.inputs,
            outputs=(*(linear.nodes[0] for linear in linears), *others),
            found_norm=norm,
            found_linears=linears,
        )
