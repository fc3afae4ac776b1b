"""A module as a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .blueprint import blueprint
from .branches import is_cond
from .copied import branch_off
from .graphs import remove_dead


@dataclass(frozen=True)
class Traced:
    """A module as a graph: its weights come first among the placeholders.

    Attributes:
        graph: Placeholders for `weights`, then for the inputs.
        weights: Names of parameters and buffers within the module.
        branches: Branches of the graph, to which weights are operands like any value.
    """

    graph: fx.Graph
    weights: tuple[str, ...]
    branches: Mapping[str, fx.Graph] = field(default_factory=dict)


def trace(module: nn.Module, inputs: Sequence[Any], mode: Any) -> Traced:
    """Trace a module on fake inputs, keeping `linear`, `softmax` and the like as single ops."""
    named, _ = blueprint(module)
    with mode:
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in named.values()]

    def call(*flat: Any) -> Any:
        weights = dict(zip(named, flat[: len(named)], strict=True))
        return torch.func.functional_call(module, weights, flat[len(named) :])

    # Old and new program share symbols: a trace that asks for a size may not settle it for both.
    with torch.no_grad(), mode, mode.shape_env.suppress_guards():
        # Tracing tells values apart by identity, and two nodes may record one and the same.
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        traced = make_fx(call, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *fakes, *inputs
        )
    remove_dead(traced.graph)
    branches: dict[str, fx.Graph] = {}
    for node in [node for node in traced.graph.nodes if is_cond(node)]:
        keys, operands = branch_off(traced, node, node.args[3], branches, "")
        node.args = (node.args[0], *keys, operands)
        node.meta["val"] = tuple(node.meta["val"])
    remove_dead(traced.graph)
    return Traced(traced.graph, tuple(named), branches)
