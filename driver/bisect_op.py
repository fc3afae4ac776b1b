"""Find the op at which what stands in a region's place goes wrong.

Both run on the same inputs, in the type of the model and in fp64. Where they agree in fp64, some
op loses precision: each op of the module is run once more on inputs taken from the fp64 run, and
the first whose own error exceeds rounding is named. Where they differ in fp64 the module is another
function: named is the first op whose value the region never computes, and nothing after it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.blueprint import blueprint
from ..ir.graphs import output_nodes
from ..ir.regions import Region
from ..ir.run import run_nodes
from ..ir.shapes import fake_mode
from ..ir.trace import trace
from .bisect_search import distance

ROUNDINGS = 64  # of an op's own type that its result may be off by before it counts as wrong
Env = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class OpFault:
    """The first op that goes wrong inside a replacement.

    Attributes:
        verdict: `numerical`, the function is right and loses precision; `different`, it is another
            function of its inputs; or `same`, up to rounding the region alone shows no difference.
        op: The op with its arguments, as in `gelu(linear, approximate=none)`; empty for `same`.
        error: Relative error of its result: against fp64, or against the nearest value that the
            replaced region computes.
        nearest: That value's op in the region; empty for `numerical`.
        region_error: Relative error of the region's outputs on the same inputs.
    """

    verdict: str
    op: str
    error: float
    nearest: str
    region_error: float

    def __str__(self) -> str:
        """Render as a sentence."""
        if self.verdict == "same":
            return f"alone it computes the same but for rounding, {self.region_error:.2g}"
        if self.verdict == "numerical":
            return f"{self.op} loses precision: its own error is {self.error:.2g}"
        instead = f"; the nearest there is {self.nearest}, {self.error:.2g} away"
        return (
            f"{self.op} has no counterpart in the region it replaces"
            f"{instead if self.nearest else ''}"
        )


def find_op(region: Region, module: nn.Module, values: Sequence[Any]) -> OpFault:
    """Compare a region with its replacement, op by op.

    Args:
        region: What was replaced.
        module: What stands there instead.
        values: One per entry of `region.inputs`.
    """
    new, old = _Traced(region, module), _Old(region)
    found, expected = new.run(values, None), old.run(values, None)
    deep_found, deep = new.run(values, torch.float64), old.run(values, torch.float64)
    error = _worst(new.results(found), old.results(expected))
    function = _worst(new.results(deep_found), old.results(deep))
    if function < error / 2 or error == 0:
        op, own = _imprecise(new, region, found, deep_found)
        return OpFault("numerical" if op else "same", op, own, "", error)
    op, own, nearest = _foreign(new, deep_found, deep, function / 2)
    return OpFault("different", op, own, nearest, error)


class _Traced:
    """A module as a graph of its own."""

    def __init__(self, region: Region, module: nn.Module) -> None:
        inputs = [node.meta["val"] for node in region.inputs]
        mode = fake_mode(region.program.graphs[region.graph])
        self.region, self.graph = region, trace(module, inputs, mode).graph
        weights = blueprint(module)[0]
        self.weights = list(weights.values())
        self.nodes = [node for node in self.graph.nodes if node.op == "call_function"]
        self.places = [node for node in self.graph.nodes if node.op == "placeholder"]
        shown = [*weights, *(node.name for node in region.inputs)]
        self.names = dict(zip(self.places, shown, strict=True))

    def run(self, values: Sequence[Any], dtype: torch.dtype | None) -> Env:
        known = dict(zip(self.places, _as(dtype, [*self.weights, *values]), strict=True))
        return run_nodes(self.region.program, self.nodes, known, None, dtype)

    def results(self, env: Env) -> list[Any]:
        return [env[node] for node in output_nodes(self.graph)]


class _Old:
    """The region as it was."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def run(self, values: Sequence[Any], dtype: torch.dtype | None) -> Env:
        region = self.region
        known = dict(zip(region.inputs, _as(dtype, values), strict=True))
        return run_nodes(region.program, region.nodes, known, region.instance, dtype)

    def results(self, env: Env) -> list[Any]:
        return [env[node] for node in self.region.outputs]


def _imprecise(new: _Traced, region: Region, found: Env, deep: Env) -> tuple[str, float]:
    """Return the first op whose own error exceeds rounding, and that error; "" for none."""
    for node in new.nodes:
        if not _is_float(found[node]):
            continue
        known = {source: _like(deep[source], found[source]) for source in node.all_input_nodes}
        value = run_nodes(region.program, [node], known, None)[node]
        error = distance(value, deep[node])
        types = [v.dtype for v in known.values() if _is_float(v)] or [value.dtype]
        if error > ROUNDINGS * max(torch.finfo(dtype).eps for dtype in types):
            return spelled(node, new.names), error
    return "", 0.0


def _foreign(new: _Traced, found: Env, old: Env, tolerance: float) -> tuple[str, float, str]:
    """Return the op that leads away from everything the region computes, and what is nearest.

    An op without a counterpart is excused when all that read it have one: the module may spell
    the same thing in other steps.
    """
    nearest = {node: _nearest(found[node], old) for node in new.nodes}
    agrees: dict[fx.Node, bool] = {}
    for node in new.nodes:
        close = nearest[node][0] <= tolerance
        inside = (agrees.get(source, True) for source in node.all_input_nodes)
        agrees[node] = close if isinstance(found[node], Tensor) else all(inside)
    excused: dict[fx.Node, bool] = {}
    for node in reversed(new.nodes):
        excused[node] = agrees[node] or all(excused.get(user, False) for user in node.users)
    suspects = [
        node
        for node in new.nodes
        if not excused[node] and all(excused.get(source, True) for source in node.all_input_nodes)
    ]
    node = suspects[0] if suspects else output_nodes(new.graph)[0]
    error, other = nearest.get(node, (float("inf"), None))
    return spelled(node, new.names), error, spelled(other) if other else ""


def _nearest(value: Any, old: Env) -> tuple[float, fx.Node | None]:
    """Return the relative distance to the nearest value of the same size, and its node."""
    best: tuple[float, fx.Node | None] = (float("inf"), None)
    if not isinstance(value, Tensor):
        return best
    for node, other in old.items():
        if isinstance(other, Tensor) and other.numel() == value.numel():
            error = distance(value.reshape(-1), other.reshape(-1))
            best = min(best, (error, node), key=lambda pair: pair[0])
    return best


def spelled(node: fx.Node, names: Mapping[fx.Node, str] | None = None) -> str:
    """Return an op with its arguments, as in `gelu(linear, approximate=tanh)`.

    Args:
        node: A call, or a value that comes from outside.
        names: What to call values; their own names by default.
    """

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return (names or {}).get(value, value.name)
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(text, value))}]"
        return str(value).removeprefix("torch.")

    if node.op != "call_function":
        return text(node)
    name = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
    arguments = [*map(text, node.args), *(f"{k}={text(v)}" for k, v in node.kwargs.items())]
    return f"{name}({', '.join(arguments)})"


def _worst(found: Sequence[Any], expected: Sequence[Any]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((distance(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs), default=0.0)


def _as(dtype: torch.dtype | None, values: Sequence[Any]) -> list[Any]:
    return [value if dtype is None or not _is_float(value) else value.to(dtype) for value in values]


def _like(value: Any, model: Any) -> Any:
    """Return a value of the fp64 run in the type it has in the model."""
    if isinstance(value, tuple | list):
        return type(value)(_like(v, m) for v, m in zip(value, model, strict=True))
    return value.to(model.dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
