"""Feed-forward networks: two matrix products around an activation, beside a residual stream.

plain:  y = act(x @ up.T) @ down.T            gated:  y = (act(x @ gate.T) * (x @ up.T)) @ down.T
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..program import Program
from ..regions import Region, unique_paths
from .activation import Activation, activation_of
from .calls import is_layer, joint_path, op, peel
from .flow import Flow, NotRecognized, flow_of
from .layer import Layer
from .residual import Residual, residual_of


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward(Region):
    """The feed-forward sublayer of a block.

    A network of this shape that does not add to the stream it reads (an embedding of the time
    step, a projector, a head) is no sublayer and is left out.

    Attributes:
        x: What it reads.
        y: What it returns.
        activation: `gelu`, `gelu_tanh`, `silu`, `relu`, `quick_gelu`, `sigmoid`, ...
        dim: Width of the stream.
        ffn_dim: Hidden neurons.
        up_layer: [ffn_dim, dim]; perhaps a share of a layer that is gate and up at once.
        gate_layer: [ffn_dim, dim]; None in a plain network.
        down_layer: [dim, ffn_dim].
    """

    x: fx.Node
    y: fx.Node
    activation: str
    dim: int
    ffn_dim: int
    up_layer: Layer
    gate_layer: Layer | None
    down_layer: Layer
    kind: ClassVar[str] = "feed_forward"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Gate if there is one, up, down."""
        return (*((self.gate_layer,) if self.gate_layer else ()), self.up_layer, self.down_layer)

    @property
    def is_gated(self) -> bool:
        """Whether the hidden neurons are multiplied by activated gates."""
        return self.gate_layer is not None

    @property
    def is_dense(self) -> bool:
        """Whether all weights are stored as numbers."""
        return all(layer.is_dense for layer in self.layers)

    @property
    def up(self) -> Tensor:
        """[ffn_dim, dim]; ask `is_dense` first."""
        return self.up_layer.weight

    @property
    def gate(self) -> Tensor | None:
        """[ffn_dim, dim], or None in a plain network; ask `is_dense` first."""
        return self.gate_layer.weight if self.gate_layer else None

    @property
    def down(self) -> Tensor:
        """[dim, ffn_dim]; ask `is_dense` first."""
        return self.down_layer.weight

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        names = ("activation", "is_gated", "dim", "ffn_dim")
        return {name: getattr(self, name) for name in names}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        for name in ("up_layer", "gate_layer", "down_layer"):
            part = getattr(self, name)
            bound.__dict__[name] = part and part.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the networks that are sublayers of a residual block."""
        flow = flow_of(graph)
        found = [parts for parts in _candidates(flow) if isinstance(_back(flow, parts), Residual)]
        paths = unique_paths([joint_path(n.node for n in _layers(parts)) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    @classmethod
    def misses(cls, graph: fx.Graph) -> list[NotRecognized]:
        """Say where there is a network of this shape that is no sublayer, and why."""
        flow = flow_of(graph)
        ways = [_back(flow, parts) for parts in _candidates(flow)]
        return [way for way in ways if isinstance(way, NotRecognized)]


def _back(flow: Flow, parts: dict[str, Any]) -> Residual | NotRecognized:
    return residual_of(flow, FeedForward.kind, (parts["x"],), parts["y"])


def _layers(parts: dict[str, Any]) -> Iterator[Layer]:
    return (
        layer for layer in (parts["gate_layer"], parts["up_layer"], parts["down_layer"]) if layer
    )


def _candidates(flow: Flow) -> Iterator[dict[str, Any]]:
    """Yield the fields of every network of the right shape, wherever its output goes."""
    for down in flow.graph.nodes:
        if not is_layer(down):
            continue
        hidden = peel(down.args[0])
        parts = _gated(flow, hidden) or _plain(flow, hidden)
        if parts is None:
            continue
        activation, up, gate = parts
        x = up.inputs[0]
        if gate is not None and gate.inputs[0] is not x:
            continue
        start, stop = up.features or (0, 0)
        inside = {down, up.node, *activation.nodes, hidden}
        for source, layer in ((activation.source, gate or up), (down.args[0], None)):
            inside |= _way(source, layer.node if layer else hidden)
        if gate is not None:
            inside |= _way(_factor(hidden, activation), up.node) | {gate.node}
        yield {
            **flow.enclose(inside, down),
            "x": x,
            "y": down,
            "activation": activation.kind,
            "dim": up.in_features,
            "ffn_dim": stop - start,
            "up_layer": up,
            "gate_layer": gate,
            "down_layer": Layer.of(down, Layer.all_features(down)),
        }


Parts = tuple[Activation, Layer, Layer | None]


def _plain(flow: Flow, hidden: fx.Node) -> Parts | None:
    activation = activation_of(hidden)
    if activation is None:
        return None
    up = Layer.behind(flow, activation.source, untouched=True)
    return (activation, up, None) if up else None


def _gated(flow: Flow, hidden: fx.Node) -> Parts | None:
    """Match `act(gate) * up`."""
    if op(hidden) != "mul":
        return None
    operands = [n for n in hidden.args if isinstance(n, fx.Node)]
    for side in operands:
        activation = activation_of(peel(side))
        if activation is None or len(operands) != 2:
            continue
        gate = Layer.behind(flow, activation.source, untouched=True)
        up = Layer.behind(flow, _factor(hidden, activation), untouched=True)
        if gate and up and (gate.node, gate.features) != (up.node, up.features):
            return activation, up, gate
    return None


def _factor(hidden: fx.Node, activation: Activation) -> fx.Node:
    """Return the operand of a product that is not the activation."""
    left, right = hidden.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return right if peel(left) is activation.result else left


def _way(value: Any, source: fx.Node) -> set[fx.Node]:
    """Return the nodes that lay out `source` as `value`."""
    nodes: set[fx.Node] = set()
    while value is not source and value.op == "call_function":
        nodes.add(value)
        value = value.args[0]
    return nodes
