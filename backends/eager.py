"""The reference: the flat program as PyTorch runs it, one op after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        lowered = lower_structural(program, options)
        return EagerProgram(lowered.module(), lowered.tensors.values())


class EagerProgram(Lowered):
    """A flat graph module."""

    def __init__(self, module: fx.GraphModule, weights: Iterable[Tensor]) -> None:
        self.module = module
        self._held = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [self._own(value) for value in self.module(*inputs)]

    def _own(self, value: Any) -> Any:
        """Copy an output that is a weight, or the caller could write into the program."""
        held = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._held
        return value.clone() if held else value
