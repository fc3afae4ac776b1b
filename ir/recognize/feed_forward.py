"""Feed-forward networks: two matrix products around an activation, on a residual stream.

plain:  y = act(x @ up.T) @ down.T            gated:  y = (act(x @ gate.T) * (x @ up.T)) @ down.T

Matrix products may be pointwise convolutions, with a depthwise one among the hidden neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..graphs import remembered
from ..program import Program
from ..regions import Region, find_once, unique_paths
from .attention import Attention
from .calls import LAYERS, arguments, calls_to, is_layer, joint_path, op, peel, shape
from .convolution import CONVOLUTIONS, Pointwise, is_pointwise, kernel
from .experts import Experts, shared_experts
from .flow import Flow, NotRecognized, flow_of
from .layer import Layer, Range
from .neurons import hidden_of
from .path import layout_between
from .residual import Residual, residual_of, straight_of, ways_of


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward(Region):
    """The feed-forward sublayer of a block.

    A network of this shape that returns to no stream (an embedding of the time step, a projector,
    a head) is no sublayer and is left out; so is the shared expert of a network in experts.

    Attributes:
        x: What it reads.
        y: What it returns; the hidden neurons where `shares_down` is true.
        activation: `gelu`, `gelu_tanh`, `silu`, `relu`, `quick_gelu`, `sigmoid`, ...; `none` where
            two halves are multiplied as they are.
        axis: What it mixes: `channels`, or `tokens` where these were turned to the last axis.
        dim: Width of what it reads.
        ffn_dim: Hidden neurons.
        up_layer: [ffn_dim, dim]; perhaps a share of a layer that is gate and up at once.
        gate_layer: [ffn_dim, dim]; None in a plain network.
        down_layer: [dim, ffn_dim]; perhaps the share of a matrix that reads the hidden neurons and
            the heads of an attention side by side.
        depthwise: Depthwise convolutions among the hidden neurons.
    """

    x: fx.Node
    y: fx.Node
    activation: str
    axis: str
    dim: int
    ffn_dim: int
    up_layer: Layer
    gate_layer: Layer | None
    down_layer: Layer
    depthwise: tuple[fx.Node, ...] = ()
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
    def shares_down(self) -> bool:
        """Whether one matrix reads hidden neurons and something else; canonicalize splits it."""
        return self.down_layer.columns is not None

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
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.axis != "channels":
            found["axis"] = self.axis
        if self.depthwise:
            found["kernels"] = [list(kernel(node)) for node in self.depthwise]
        return found

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        for name in ("up_layer", "gate_layer", "down_layer"):
            part = getattr(self, name)
            bound.__dict__[name] = part and part.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the networks that are sublayers of a residual block."""
        found, _ = remembered(graph, "feed-forward candidates", _sorted_out)
        paths = unique_paths([joint_path(n.node for n in _layers(parts)) for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]

    @classmethod
    def misses(cls, graph: fx.Graph) -> list[NotRecognized]:
        """Say where there is a network of this shape that is no sublayer, and why."""
        _, misses = remembered(graph, "feed-forward candidates", _sorted_out)
        return misses


def _sorted_out(graph: fx.Graph) -> tuple[list[dict[str, Any]], list[NotRecognized]]:
    """Return the fields of the networks that are sublayers, and why others are none."""
    flow = flow_of(graph)
    for attention in find_once(graph, Attention):
        ways_of(flow, attention)
    find_once(graph, Experts)  # whose ways are streams that others continue
    shared = shared_experts(graph)
    found: list[dict[str, Any]] = []
    misses: list[NotRecognized] = []
    networks = (p for p in _candidates(flow) if p["down_layer"].node not in shared)
    ways = [(parts, _back(flow, parts)) for parts in networks]
    left = {way.out for way in flow.ways.values() if isinstance(way, Residual)}
    for parts, way in ways:
        x, y = parts["x"], parts["y"]
        fits = way if isinstance(way, Residual) else straight_of(flow, x, y, left)
        if fits is not None:
            found.append(parts | {"axis": _axis(fits, x)})
        elif isinstance(way, NotRecognized):
            misses.append(way)
    return found, misses


def _back(flow: Flow, parts: dict[str, Any]) -> Residual | NotRecognized:
    return residual_of(flow, FeedForward.kind, (parts["x"],), parts["down_layer"].node)


def _layers(parts: dict[str, Any]) -> Iterator[Layer]:
    return (
        layer for layer in (parts["gate_layer"], parts["up_layer"], parts["down_layer"]) if layer
    )


def _axis(way: Residual, x: fx.Node) -> str:
    """Say whether what a norm has left in the last axis, the channels, is in another one now."""
    if way.norm_before is None or way.norm_before.form == "group_norm":
        return "channels"
    turned = 0
    node: Any = x
    while node is not way.norm_before.outputs[0] and node in way.nodes:
        rank, axes = len(shape(node)), [a for a in node.args[1:] if isinstance(a, int)]
        turns = op(node) in ("transpose", "swapaxes") and rank - 1 in {a % rank for a in axes}
        turned += turns or (op(node) == "permute" and node.args[1][-1] % rank != rank - 1)
        node = node.args[0]
    return "tokens" if turned % 2 else "channels"


def _candidates(flow: Flow) -> Iterator[dict[str, Any]]:
    """Yield the fields of every network of the right shape, wherever its output goes."""
    for down in calls_to(flow.graph, LAYERS | CONVOLUTIONS):
        if is_layer(down):
            for value, columns in _inputs(down):
                yield from _network(flow, value, down, columns)
        elif is_pointwise(down):
            yield from _network(flow, down.args[0], down, None)


def _inputs(down: fx.Node) -> Iterator[tuple[fx.Node, tuple[int, int] | None]]:
    """Yield what a layer reads, or each of the values it reads side by side with its columns."""
    value = down.args[0]
    assert isinstance(value, fx.Node)
    joined = peel(value)
    if op(joined) != "cat" or arguments(joined).get("dim", 0) not in (-1, len(shape(joined)) - 1):
        yield value, None
        return
    start = 0
    for part in joined.args[0]:  # type: ignore[union-attr]
        stop = start + int(shape(part)[-1])  # type: ignore[arg-type]
        yield part, (start, stop)  # type: ignore[misc]
        start = stop


def _network(
    flow: Flow, value: Any, node: fx.Node, columns: Range | None
) -> Iterator[dict[str, Any]]:
    """Yield the fields of the network whose hidden neurons a layer reads, if there is one."""
    found = hidden_of(flow, peel(value))
    if found is None:
        return
    down = (
        Layer.of(node, Layer.all_features(node), columns)
        if is_layer(node)
        else Pointwise.of_channels(node, None)
    )
    shares = down.columns is not None
    result = found.hidden if shares else down.node
    inside = found.nodes | (set() if shares else {down.node} | layout_between(value, found.hidden))
    rows = found.up.rows
    yield {
        **flow.enclose(inside, result),
        "x": found.up.inputs[0],
        "y": result,
        "activation": found.activation,
        "dim": found.up.in_features,
        "ffn_dim": rows.count if rows else down.in_features,
        "up_layer": found.up,
        "gate_layer": found.gate,
        "down_layer": down,
        "depthwise": tuple(found.depthwise),
    }
