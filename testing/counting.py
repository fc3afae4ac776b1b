"""Count what a run really computes, from the shapes of real tensors below the ops of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir.cost import is_view
from ..ir.program import Program
from ..ir.run import run

aten = torch.ops.aten


@dataclass
class Counted:
    """FLOPs of one run.

    Attributes:
        products: Of matrix products, two per multiply-add.
        elementwise: One per element of what everything else computes.
    """

    products: int = 0
    elementwise: int = 0


def counted(program: Program, inputs: Sequence[Tensor]) -> Counted:
    """Run a program and count."""
    total = Counted()
    with _Products() as mode:
        before = 0

        def see(instance: str | None, node: fx.Node, value: Any) -> None:
            nonlocal before
            multiplied = mode.flops > before
            before = mode.flops
            looks = node.op != "call_function" or is_view(node)
            if not (looks or multiplied) and isinstance(value, Tensor):
                total.elementwise += value.numel()

        run(program, inputs, on_node=see)
    total.products = mode.flops
    total.elementwise += mode.elementwise
    return total


class _Products(TorchDispatchMode):
    """Adds up matrix products as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.elementwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten.mm, aten.bmm):
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif packet in (aten.addmm, aten.baddbmm):
            self.flops += 2 * result.numel() * args[1].shape[-1]
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]
            each = query.shape[-1] + value.shape[-1]
            self.flops += 2 * math.prod(query.shape[:3]) * key.shape[-2] * each
        elif func is torch.ops.blockwright.hash_linear.default:
            self.flops += 2 * result.numel() * len(args[1])
            self.elementwise += 3 * args[0].numel()
        elif func.namespace == "blockwright" and "linear" in func.name():
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif func is torch.ops.blockwright.moe_ffn.default:
            self._visits(*args[1:5])
        return result

    def _visits(self, index: Tensor, weight: Tensor, gate: Tensor | None, up: Tensor) -> None:
        """Count experts: products with two matrices, or three, an activation, a weighted sum."""
        visits, (_, hidden, dim) = index.numel(), up.shape
        matrices = 2 if gate is None else 3
        self.flops += 2 * visits * matrices * hidden * dim
        self.elementwise += visits * ((matrices - 1) * hidden + 2 * dim)
