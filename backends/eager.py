"""The reference: the flat program as PyTorch runs it, one op after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.graphs import copy_graph
from ..ir.program import Program
from .base import Backend, Lowered, refuse_unsupported
from .cpu_ops import lower_structural

KERNELS: Mapping[str, Callable[..., Any]] = {}
"""Fast functions that stand in for the reference of an op, by its name, as in
`blockwright.int8_linear.default`. This is the one place to add one."""


class EagerBackend(Backend):
    """Runs programs in PyTorch on the device their tensors are on."""

    name: ClassVar[str] = "eager"

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        refuse_unsupported(program, self.name)
        return EagerProgram(call_kernels(lower_structural(program, options).module()))


class EagerProgram(Lowered):
    """A flat graph module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(*inputs))


def call_kernels(module: fx.GraphModule) -> fx.GraphModule:
    """Let a module call fast functions where `KERNELS` has them."""
    if any(str(node.target) in KERNELS for node in module.graph.nodes):
        graph = copy_graph(module.graph)  # the program's own graph stays as it is
        for node in graph.nodes:
            node.target = KERNELS.get(str(node.target), node.target)
        module.graph = graph
    return module
