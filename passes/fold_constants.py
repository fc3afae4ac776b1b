"""Compute once what depends on no input.

Position tables, masks of fixed size, products of two weights: an expression over weights and
literals becomes the tensor it evaluates to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..ir.errors import OptionError
from ..ir.recognize import ConstantExpression
from .base import Pass, Promise, Skip


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass[ConstantExpression, bool]):
    """Replace expressions that depend on no input by their value.

    Attributes:
        max_growth_bytes: An expression stays when its value is larger than the weights it reads
            by more than this many bytes.

    Raises:
        OptionError: `max_growth_bytes` is negative.

    Source: constant folding, e.g. Wegman and Zadeck, 1991.
    Exact when: always; the expression is evaluated by the operators of the graph.
    """

    name: ClassVar[str] = "fold-constants"
    promise: ClassVar[Promise] = Promise.EXACT
    max_growth_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.max_growth_bytes < 0:
            raise OptionError(
                f"fold-constants: max_growth_bytes={self.max_growth_bytes} is negative; use 0 or"
                " more."
            )

    def decide(self, region: ConstantExpression) -> bool | Skip:
        growth = _bytes(region.outputs[0].meta["val"]) - sum(
            _bytes(region.tensor(node)) for node in region.weights
        )
        if growth > self.max_growth_bytes:
            return Skip(f"grows by {growth} bytes, over {self.max_growth_bytes}", at=region)
        return True

    def replace(self, region: ConstantExpression, decision: bool) -> nn.Module:
        return Constant(region.evaluate())


class Constant(nn.Module):
    """A value that is always the same."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone())

    def forward(self) -> Tensor:
        return self.value


def _bytes(value: Tensor) -> int:
    return int(value.numel()) * value.element_size()
