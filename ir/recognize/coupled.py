"""What goes together when a head, a group of heads or a hidden neuron is taken out.

neuron i       row i of gate and up with their biases, kernel i of a convolution, column i of down
head i         rows of query, key and value with their biases and norms, columns of the output
a group        a key and value head with all query heads that read it

coupled = coupled_neurons(ffn)                 coupled = coupled_heads(attention)
coupled.objection or coupled.keep([0, 2, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import OptionError
from ..graphs import remembered
from ..region_module import Call, RegionModule
from ..regions import Region
from .attention import Attention
from .calls import shape
from .feed_forward import FeedForward
from .layer import Layer
from .resized import resized
from .unit_rules import follow
from .units import NONE, Labels, Mixed, Walk


@dataclass(frozen=True)
class Share:
    """What units own of a weight.

    Attributes:
        slot: The `get_attr` node of the weight.
        axis: Axis of the weight.
        units: Which unit each position along the axis belongs to; -1 for none.
        value: What a layer reads through these positions; None where they are no columns.
    """

    slot: fx.Node
    axis: int
    units: Labels
    value: fx.Node | None = None


@dataclass(frozen=True)
class Coupled:
    """The units of a region, and where its weights hold them.

    Attributes:
        region: An attention or a feed-forward network.
        count: Number of units.
        shares: Where they are in the weights.
        objection: Why units cannot be taken out, completing "the region ..."; None when they can.
        groups: Query heads are in so many groups, of which each must keep as many; 1 elsewhere.
        axes: Units along the axes of the values in the region.
    """

    region: Region
    count: int
    shares: tuple[Share, ...]
    objection: str | None
    groups: int
    axes: Mapping[fx.Node, Any]

    def kept(self, units: Collection[int]) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Call]]:
        """Return weights and calls of the region with some of its units and without the others.

        Raises:
            OptionError: There are no such units, or groups would keep different numbers, or none.
        """
        self._check(units)
        kept = {*units, NONE}
        weights: dict[fx.Node, Tensor] = {}
        for share in self.shares:
            old = weights.get(share.slot, self.region.tensor(share.slot))
            places = [place for place, unit in enumerate(share.units) if unit in kept]
            index = torch.tensor(places, device=old.device)
            weights[share.slot] = old.index_select(share.axis, index)
        return weights, resized(self.region.nodes, self.axes, kept)

    def masked(self, units: Collection[int]) -> dict[fx.Node, Tensor]:
        """Return weights with which units beside these contribute nothing; none for all units."""
        kept, weights = {*units, NONE}, dict[fx.Node, Tensor]()
        for share in self.shares:
            gone = [place for place, unit in enumerate(share.units) if unit not in kept]
            if share.value is not None and gone:
                old = self.region.tensor(share.slot)
                index = torch.tensor(gone, device=old.device)
                weights[share.slot] = old.index_fill(share.axis, index, 0)
        return weights

    def keep(self, units: Collection[int]) -> RegionModule:
        """Return the region with some of its units; ask for its `objection` first."""
        return RegionModule(self.region, *self.kept(units))

    def mask(self, units: Collection[int]) -> RegionModule:
        """Return the region as it is, but for other units, which contribute nothing.

        With all units it computes the same bits.
        """
        return RegionModule(self.region, self.masked(units))

    def name(self, share: Share) -> str:
        """Return the name of a weight in the program."""
        instance = self.region.instance
        target = str(share.slot.target)
        return self.region.program.instances[instance].weights[target] if instance else target

    def _check(self, units: Collection[int]) -> None:
        size = self.count // self.groups
        counts = {sum(u // size == group for u in units) for group in range(self.groups)}
        known = all(0 <= unit < self.count for unit in units)
        if not known or len(counts) > 1 or 0 in counts:
            each = f", as many of each {size}" if self.groups > 1 else ""
            raise OptionError(
                f"units {sorted(units)} cannot be what is kept of {self.count}.",
                where=self.region.label,
                remedy=f"keep one or more of 0 to {self.count - 1}{each}.",
            )


def coupled_neurons(ffn: FeedForward) -> Coupled:
    """Return the hidden neurons of a feed-forward network, gates included."""
    return _coupled(ffn, "neurons", _neuron_rows)


def coupled_heads(attention: Attention, *, queries: bool = False) -> Coupled:
    """Return the heads of an attention.

    Args:
        attention: Where.
        queries: Query heads alone, as many of each group that shares keys and values. By default a
            unit is a key and value head with the query heads that read it.
    """
    apart = queries and attention.heads != attention.kv_heads
    return _coupled(attention, "queries" if apart else "heads", _head_rows)


@dataclass(frozen=True)
class _Found:
    """What is the same in all instances of a class."""

    count: int
    groups: int
    shares: tuple[Share, ...]
    objection: str | None
    axes: Mapping[fx.Node, Any]


_Rows = dict[fx.Node, Labels]


def _coupled(
    region: Any, kind: str, rows: Callable[[Any, str], tuple[int, int, _Rows] | str]
) -> Coupled:
    key = ("coupled", kind, region.nodes)
    found = remembered(region.nodes[0].graph, key, lambda _: _find(region, rows(region, kind)))
    objection = found.objection
    for share in found.shares:
        if objection is None and region.is_shared(share.slot):
            objection = f"shares the weight {share.slot.target} with another place of the model"
    return Coupled(region, found.count, found.shares, objection, found.groups, found.axes)


def _find(region: Region, seeds: tuple[int, int, _Rows] | str) -> _Found:
    if isinstance(seeds, str):
        return _Found(0, 1, (), seeds, {})
    count, groups, rows = seeds
    walk, objection = Walk(rows), None
    try:
        for node in region.nodes:
            follow(walk, node)
    except Mixed as reason:
        objection = str(reason)
    for node in region.outputs if objection is None else ():
        if any(walk.of(node)):
            objection = f"has units that are read outside of it, as {node.name}"
    shares = tuple(
        Share(slot, axis, units, walk.sinks.get(slot) if axis == 1 else None)
        for (slot, axis), units in walk.weights.items()
    )
    return _Found(count, groups, shares, objection, walk.axes)


def _neuron_rows(ffn: FeedForward, kind: str) -> tuple[int, int, _Rows] | str:
    makers = [layer for layer in (ffn.gate_layer, ffn.up_layer) if layer]
    if not all(layer.is_dense for layer in makers):
        return "has weights that are no plain matrices"
    return ffn.ffn_dim, 1, _labelled((layer, range(ffn.ffn_dim)) for layer in makers)


def _head_rows(attention: Attention, kind: str) -> tuple[int, int, _Rows] | str:
    heads, kv_heads = attention.heads, attention.kv_heads
    if not heads or not kv_heads or heads % kv_heads:
        return "has an unknown number of heads"
    layers: list[tuple[Layer, int]] = []
    for stream in attention.streams:
        makers = (stream.query, stream.key, stream.value)
        if any(layer is None or not layer.is_dense for layer in makers):
            return "has queries, keys or values without a plain linear layer of their own"
        named = zip(makers, (heads, kv_heads, kv_heads), strict=True)
        layers += [(layer, count) for layer, count in named if layer]
    if kind == "queries":
        chosen = [(s.query, range(heads)) for s in attention.streams if s.query]
        return heads, kv_heads, _labelled((layer, units) for layer, units in chosen)
    return (
        kv_heads,
        1,
        _labelled(
            (layer, [head * kv_heads // count for head in range(count)]) for layer, count in layers
        ),
    )


def _labelled(layers: Iterable[tuple[Layer, Sequence[int]]]) -> _Rows:
    """Return the units of the rows of weights, of which layers have equal shares for each unit."""
    found: dict[fx.Node, list[int]] = {}
    for layer, units in layers:
        assert layer.weight_node is not None
        assert layer.rows is not None
        total = int(shape(layer.weight_node)[0])
        labels = found.setdefault(layer.weight_node, [NONE] * total)
        width = layer.rows.count // len(units)
        for place, row in enumerate(layer.rows.take(torch.arange(total)).tolist()):
            labels[row] = units[place // width]
    return {node: tuple(labels) for node, labels in found.items()}
