"""The reference: the flat program as PyTorch runs it, one op after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.program import Program
from .base import Backend, Lowered, refuse_unsupported
from .cpu_ops import lower_structural


class EagerBackend(Backend):
    """Runs programs in PyTorch on the device their tensors are on."""

    name: ClassVar[str] = "eager"

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        refuse_unsupported(program, self.name)
        return EagerProgram(lower_structural(program, options).module())


class EagerProgram(Lowered):
    """A flat graph module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(*inputs))
