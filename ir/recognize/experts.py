"""Feed-forward networks in experts: a router, the few it chooses, and perhaps one for all.

y = shared(x) + sum over chosen i of  weight[i] * expert[i](x)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from ..graphs import remembered
from ..program import Program
from ..regions import Region, find_once, unique_paths
from ..run import run_nodes
from .attention import Attention
from .calls import LAYOUT, arguments, calls_to, is_layer, joint_path, op, peel, readers, shape
from .flow import Flow, flow_of
from .layer import Layer
from .neurons import Hidden, hidden_of
from .path import nodes_between
from .residual import Residual, residual_of, straight_of, ways_of

_PARTS = ("gate", "gate_bias", "up", "up_bias", "down", "down_bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts(Region):
    """A feed-forward sublayer of which every token visits a part.

    Attributes:
        x: What it reads.
        y: What it returns.
        call: The op that runs the experts.
        router: The layer whose scores choose; None when they come from something else.
        scores: What the choice is made from, [*batch, experts]; None when that is not known.
        activation: As in `FeedForward`.
        is_gated: Whether hidden neurons are multiplied by activated gates.
        dim: Width of what it reads.
        experts: How many there are to choose from.
        active: How many a token visits; None when a dynamic size says so.
        ffn_dim: Hidden neurons of one of them.
        shared_ffn_dim: Hidden neurons of the expert every token visits; 0 without one.
        shared_gate: [shared_ffn_dim, dim], or None.
        shared_up: [shared_ffn_dim, dim], or None.
        shared_down: [dim, shared_ffn_dim], or None.
        bias: Slot of a bias that is added apart; None where the shared expert has it.
    """

    x: fx.Node
    y: fx.Node
    call: fx.Node
    router: Layer | None
    scores: fx.Node | None
    activation: str
    is_gated: bool
    dim: int
    experts: int
    active: int | None
    ffn_dim: int
    shared_ffn_dim: int
    shared_gate: Layer | None
    shared_up: Layer | None
    shared_down: Layer | None
    bias: fx.Node | None
    kind: ClassVar[str] = "experts"

    @property
    def index(self) -> fx.Node:
        """The experts chosen, [*batch, active]."""
        found: fx.Node = arguments(self.call)["index"]
        return found

    @property
    def is_weighted(self) -> bool:
        """Whether gates depend on the scores, so that a router learns through them."""
        return op(peel(arguments(self.call)["weight"], LAYOUT | {"mul", "div"})) == "topk"

    @property
    def slots(self) -> dict[str, fx.Node]:
        """Where the experts' weights come from: `gate`, `up`, `down` and their biases, if any.

        A slot of the program each, or the op that makes the weight of codes.
        """
        given = arguments(self.call)
        return {name: given[name] for name in _PARTS if isinstance(given.get(name), fx.Node)}

    @property
    def is_dense(self) -> bool:
        """Whether no weight of the routed experts is stored as codes."""
        return all(slot.op == "get_attr" for slot in self.slots.values())

    def weights(self) -> dict[str, Tensor]:
        """Return the experts' weights by the names of `slots`, experts along the first axis."""
        values = run_nodes(self.program, list(self.slots.values()), {}, self.instance)
        return {name: values[slot] for name, slot in self.slots.items()}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Gate if there is one, up and down of the shared expert; none without it."""
        parts = (self.shared_gate, self.shared_up, self.shared_down)
        return tuple(layer for layer in parts if layer is not None)

    def constants(self) -> dict[str, Any]:
        """Return the constants of the role as plain data."""
        names = ("activation", "is_gated", "dim", "experts", "active", "ffn_dim", "shared_ffn_dim")
        return {name: getattr(self, name) for name in names}

    def bind(self, program: Program, graph: str, instance: str | None) -> Self:
        bound = super().bind(program, graph, instance)
        for name in ("router", "shared_gate", "shared_up", "shared_down"):
            part = getattr(self, name)
            bound.__dict__[name] = part and part.bind(program, graph, instance)
        return bound

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """Return the networks in experts of a graph."""
        flow = flow_of(graph)
        found = [_parts(flow, *ends) for ends in _ends(graph)]
        for attention in find_once(graph, Attention) if found else ():
            ways_of(flow, attention)
        for parts in found:
            way_of(flow, parts["x"], parts["y"])
        paths = unique_paths([parts.pop("path") for parts in found])
        return [cls(path=path, **parts) for path, parts in zip(paths, found, strict=True)]


def way_of(flow: Flow, x: fx.Node, y: fx.Node) -> Residual | None:
    """Return how a network in experts hangs on its stream; None when it does not."""
    way = residual_of(flow, Experts.kind, (x,), y)
    if isinstance(way, Residual):
        return way
    left = {known.out for known in flow.ways.values() if isinstance(known, Residual)}
    return straight_of(flow, x, y, left)


def shared_experts(graph: fx.Graph) -> set[fx.Node]:
    """Return the last layers of shared experts, which are no networks of their own."""
    return {shared.down for _, _, shared, _ in _ends(graph) if shared is not None}


@dataclass(frozen=True)
class _Shared:
    hidden: Hidden
    down: fx.Node


_End = tuple[fx.Node, fx.Node, _Shared | None, fx.Node | None]  # call, y, shared expert, bias


def _ends(graph: fx.Graph) -> list[_End]:
    return remembered(graph, "ends of experts", lambda g: list(_find_ends(g)))


def _find_ends(graph: fx.Graph) -> Iterator[_End]:
    """Yield the calls of experts, each with what is added to its result."""
    for call in calls_to(graph, ["moe_ffn"]):
        x, y = call.args[0], call
        shared: _Shared | None = None
        bias: fx.Node | None = None
        while len(following := readers(y)) == 1 and op(following[0]) == "add":
            (total,) = following
            others = [n for n in total.all_input_nodes if n is not y]
            if len(others) != 1:
                break
            if bias is None and others[0].op == "get_attr":
                bias = others[0]
            elif shared is None and (found := _shared(flow_of(graph), others[0], x)):
                shared = found
            else:
                break
            y = total
        yield call, y, shared, bias


def _shared(flow: Flow, down: fx.Node, x: Any) -> _Shared | None:
    """Match the network whose last layer is `down` and which reads `x`."""
    source = down.args[0] if is_layer(down) else None
    hidden = hidden_of(flow, peel(source)) if isinstance(source, fx.Node) else None
    fits = hidden is not None and hidden.up.inputs[0] is x
    return _Shared(hidden, down) if hidden and fits else None


def _parts(
    flow: Flow, call: fx.Node, y: fx.Node, shared: _Shared | None, bias: fx.Node | None
) -> dict[str, Any]:
    """Return the fields of a region, its path among them."""
    given = arguments(call)
    scores = _scores(given["index"])
    router = Layer.behind(flow, _linear(scores)) if scores is not None else None
    experts, ffn_dim, dim = (int(size) for size in shape(given["up"]))
    active = shape(given["index"])[-1]
    hidden = shared.hidden if shared else None
    inside = set(nodes_between(flow, given["x"], y))
    return {
        **flow.enclose(inside, y),
        "path": joint_path([call, *(shared.hidden.nodes if shared else ())]),
        "x": given["x"],
        "y": y,
        "call": call,
        "router": router,
        "scores": scores,
        "activation": given["activation"],
        "is_gated": given.get("gate") is not None,
        "dim": dim,
        "experts": experts,
        "active": active if isinstance(active, int) else None,
        "ffn_dim": ffn_dim,
        "shared_ffn_dim": hidden.up.rows.count if hidden and hidden.up.rows else 0,
        "shared_gate": hidden.gate if hidden else None,
        "shared_up": hidden.up if hidden else None,
        "shared_down": Layer.of(shared.down, Layer.all_features(shared.down)) if shared else None,
        "bias": bias,
    }


def _scores(index: fx.Node) -> fx.Node | None:
    """Return what a choice is made from."""
    picked = peel(index)
    source = picked if op(picked) == "topk" else None
    return source.args[0] if source is not None else None  # type: ignore[return-value]


def _linear(scores: fx.Node) -> fx.Node:
    """Return the logits that scores are made of."""
    while op(scores) in ("softmax", "sigmoid", "to", "_to_copy", "_softmax"):
        scores = scores.args[0]  # type: ignore[assignment]
    return scores
