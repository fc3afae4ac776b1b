"""Where sublayers are added to their streams: y = x + sublayer(norm(x)).

Without the addition nothing reads the sublayer any more, nor the norm, the modulation and the gate
that are its own. What comes after the sum, such as the norm of a post-norm block, stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import fx

from ..program import Program
from ..regions import Region, unique_paths
from .calls import is_layer, op, readers, shape
from .flow import flow_of
from .residual import Residual
from .sublayer import Sublayer, sublayers_of

_ADDITIONS = {"add", "sub", "addcmul"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Summand(Region):
    """The additions of a sublayer to its streams.

    Attributes:
        sublayer: What is added.
        others: What it is added to, one per output of the region: the streams, or the sum of other
            branches that join it first.
        objection: Why the model cannot do without the sublayer, completing "the sublayer ..."; None
            when it can.
    """

    sublayer: Sublayer
    others: tuple[fx.Node, ...]
    objection: str | None
    kind: ClassVar[str] = "sublayer"

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        bound.__dict__["sublayer"] = self.sublayer.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return one region per sublayer, in the order of the additions."""
        sublayers = sublayers_of(graph)
        paths = unique_paths([f"{s.region.path}.residual".strip(".") for s in sublayers])
        return [cls._of(sublayer, path) for sublayer, path in zip(sublayers, paths, strict=True)]

    @classmethod
    def _of(cls, sublayer: Sublayer, path: str) -> Self:
        flow = flow_of(sublayer.ways[0].total.graph)
        ends, objection = [], None
        for way in sublayer.ways:
            end = _addition(sublayer, way)
            ends.append(end or (way.total, way.stream))
            objection = objection or (None if end else _reason(sublayer, way))
        sums = [total for total, _ in ends]
        return cls(
            path=path,
            sublayer=sublayer,
            others=tuple(other for _, other in ends),
            objection=objection,
            **flow.enclose(set(sums), *sums),
        )


def _addition(sublayer: Sublayer, way: Residual) -> tuple[fx.Node, fx.Node] | None:
    """Return the first addition of a sublayer to something else, and what that is."""
    for value in _along(sublayer, way):
        (total,) = readers(value)
        others = [n for n in total.all_input_nodes if n is not value and n.op != "get_attr"]
        if op(total) not in _ADDITIONS or not others:
            continue
        other = total.args[0] if op(total) == "addcmul" else others[0]
        plain = op(total) == "add" or total.args[0] is other
        if isinstance(other, fx.Node) and plain and not total.kwargs:
            return (total, other) if _alike(total, other) else None
        return None
    return None


def _along(sublayer: Sublayer, way: Residual) -> Iterator[fx.Node]:
    """Yield the values between a sublayer and its stream, each with one reader."""
    ends = dict.fromkeys((*sublayer.region.outputs, getattr(sublayer.region, "y", None)))
    inside = way.nodes | {way.total}
    for value in ends:
        while value is not None and value is not way.total:
            following = readers(value)
            if len(following) != 1 or following[0] not in inside or is_layer(following[0]):
                break
            yield value
            (value,) = following


def _alike(total: fx.Node, other: fx.Node) -> bool:
    return (
        str(shape(total)) == str(shape(other))
        and total.meta["val"].dtype == other.meta["val"].dtype
    )


def _reason(sublayer: Sublayer, way: Residual) -> str:
    layers = getattr(sublayer.region, "layers", ())
    if any(layer.columns is not None for layer in layers):
        return "shares its output matrix with another sublayer; canonicalize splits it"
    if way.sign == 0:
        return "takes the place of its stream, which does not pass by it"
    return "is added to its stream in a way that is not followed"
