"""Origins: the node whose result a value still is after views, splits, a norm, and a rotation.

The multiply-adds of a rotary embedding are followed too. Along origins,
`scaled_dot_product_attention` finds its projections however they are reshaped, and a feed-forward
network the halves of a fused layer. One sweep over the graph finds them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from .calls import LAYERS, LAYOUT, SPLITS, arguments, is_layer, op, peel, shape
from .features import Features
from .norm import Norm
from .rotary import UNMIXED, Mix, Part, complex_product, negated, put_together, summed
from .written import written_of

_WHOLE = LAYOUT - SPLITS - {"getitem", "slice", "select", "narrow"}  # keep parts of a table apart


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        anchor: The node whose result it is, apart from what follows.
        features: Which of the anchor's output features, for a linear layer; of each of the joined
            values, where an anchor joins several of the same layout.
        norm: Norm it went through.
        factor: Number it was multiplied by since; None when parts differ.
        foreign: Other values it was multiplied by.
        mix: Which parts of it changed places, or were added to each other.
        mixed: Whether parts of it were added, swapped or negated.
        copies: How often each head stands in it: key and value heads repeated for the queries.
    """

    anchor: fx.Node
    features: Features | None = None
    norm: Norm | None = None
    factor: float | None = 1.0
    foreign: tuple[fx.Node, ...] = ()
    mix: Mix = UNMIXED
    mixed: bool = False
    copies: int = 1

    @property
    def part(self) -> Part:
        """What mixing it with another part depends on."""
        return self.features, self.mix, self.foreign


class Origins(dict[fx.Node, Origin]):
    """Origin of every node of a graph.

    Attributes:
        projected: The anchors that are linear layers, or join the results of several.
    """

    def __init__(self, graph: fx.Graph, norm_to: Mapping[fx.Node, Norm]) -> None:
        super().__init__()
        self.projected: set[fx.Node] = set()
        for node in graph.nodes:
            follow = _FOLLOWS.get(op(node))
            if node in norm_to:
                norm = norm_to[node]
                self[node] = self[norm.inputs[0]]._replace(norm=norm, factor=1.0)
            elif follow is not None and (origin := follow(self, node)) is not None:
                self[node] = origin

    def __missing__(self, node: fx.Node) -> Origin:
        """Return the origin of a value that is an anchor itself."""
        origin = self[node] = Origin(node)
        return origin

    def layer(self, node: fx.Node) -> Origin | None:
        """A linear layer is an anchor."""
        if not is_layer(node):
            return None
        self.projected.add(node)
        return Origin(node, Features.of(node))

    def moved(self, node: fx.Node) -> Origin | None:
        """Follow an op that lays its argument out anew, or takes a part of it."""
        value, name = node.args[0], op(node)
        if not isinstance(value, fx.Node) or (name == "getitem" and op(value) not in SPLITS):
            return None  # one of several results, not a part of one
        source = self[value]
        if name == "expand" or name == "repeat_interleave":
            source = source._replace(copies=source.copies * _copies(node, value))
        if source.features is None:
            return source
        features = source.features.after(name, node)
        if features is source.features:
            return source
        return Origin(source.anchor, features, *source[2:])

    def negated(self, node: fx.Node) -> Origin:
        """Follow a change of sign."""
        origin = self[node.all_input_nodes[0]]
        return origin._replace(mix=negated(origin.mix), mixed=True)

    def copied(self, node: fx.Node) -> Origin:
        """Follow what is copied into another tensor."""
        return self[node.args[1]]  # type: ignore[index]

    def added(self, node: fx.Node) -> Origin | None:
        """Follow a sum or difference of parts of one value."""
        one, other = node.args[:2]
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return None
        operands = [self[one], self[other]]
        if operands[0].anchor is not operands[1].anchor:
            return None
        features = Features.added([o.features for o in operands])
        mix = summed(operands[0].part, operands[1].part, minus=op(node) == "sub")
        return _whole(operands, features, mix)

    def joined(self, node: fx.Node) -> Origin | None:
        """Follow parts of one value put together again; results of several layers are an anchor."""
        operands = [self[n] for n in _pieces(node)]
        anchors = {o.anchor for o in operands}
        if len(anchors) == 1:
            features = Features.joined([o.features for o in operands], *_joint(node))
            return _whole(operands, features, put_together([o.part for o in operands]))
        return None

    def concatenated(self, node: fx.Node) -> Origin | None:
        """Follow parts of one value side by side, or of several layers: a value of its own."""
        several = [self[n] for n in node.all_input_nodes]
        layers = all(is_layer(origin.anchor) for origin in several)
        if layers:
            self.projected.add(node)
        return self.joined(node) or (Origin(node, _alike(several)) if layers else None)

    def multiplied(self, node: fx.Node) -> Origin | None:
        """Follow a value times numbers or times values that come from elsewhere."""
        left, right = node.args[:2]
        if not isinstance(left, fx.Node):
            return None
        if isinstance(right, fx.Node):
            return self._weighed(node, left, right) or self._weighed(node, right, left)
        if not isinstance(right, int | float):
            return None
        factor = self[left].factor
        times = right if op(node) == "mul" else 1 / right if right else None
        return self[left]._replace(factor=factor and times and factor * times)

    def _weighed(self, node: fx.Node, value: fx.Node, other: fx.Node) -> Origin | None:
        origin = self[value]
        if origin.anchor not in self.projected or self[other].anchor in self.projected:
            return None
        foreign = tuple(dict.fromkeys((*origin.foreign, peel(other, _WHOLE))))
        if op(node) == "mul" and node.meta["val"].is_complex():
            mix = complex_product(node, foreign[-1])
            return origin._replace(foreign=foreign, mix=mix, mixed=True)
        return origin._replace(foreign=foreign)


_FOLLOWS: dict[str, Callable[[Origins, fx.Node], Origin | None]] = {
    **dict.fromkeys(LAYERS, Origins.layer),
    **dict.fromkeys(LAYOUT, Origins.moved),
    **dict.fromkeys(("add", "sub"), Origins.added),
    **dict.fromkeys(("stack", "slice_scatter"), Origins.joined),
    **dict.fromkeys(("mul", "div"), Origins.multiplied),
    "cat": Origins.concatenated,
    "neg": Origins.negated,
    "copy": Origins.copied,
}


def _copies(node: fx.Node, value: fx.Node) -> int:
    """Return how often a node repeats what it reads."""
    if op(node) == "repeat_interleave":
        return node.args[1] if isinstance(node.args[1], int) else 1
    old, new = shape(value)[1:], shape(node)[1:]
    if len(old) != len(new):
        return 1
    return math.prod(b for a, b in zip(old, new, strict=True) if a == 1 and isinstance(b, int))


def _whole(operands: Sequence[Origin], features: Features, mix: Mix) -> Origin:
    """Return the origin of parts of one value put together again."""
    return operands[0]._replace(
        features=features,
        factor=operands[0].factor if len({o.factor for o in operands}) == 1 else None,
        foreign=tuple(dict.fromkeys(n for o in operands for n in o.foreign)),
        mix=mix,
        mixed=True,
    )


def _joint(node: fx.Node) -> tuple[int, str]:
    """Return the axis along which a node puts values together, and how."""
    if op(node) == "slice_scatter":
        written = written_of(node)
        assert written is not None
        return written.axis, "cat" if written.step == 1 else "weave"
    return arguments(node).get("dim", 0) % len(shape(node)), op(node)


def _pieces(node: fx.Node) -> list[fx.Node]:
    """Return what a node joins, in order, each as often as it does."""
    if op(node) == "slice_scatter":
        written = written_of(node)
        return list(written.pieces) if written else []
    listed: Any = node.args[0]
    return [n for n in listed if isinstance(n, fx.Node)]


def _alike(operands: Sequence[Origin]) -> Features | None:
    """Return the features of values of one layout, each from a layer of its own."""
    found = {o.features for o in operands}
    return found.pop() if len(found) == 1 else None
