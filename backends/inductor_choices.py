"""Inductor's compiled choices, given operands that lie in memory as their branches take them to.

PyTorch lowers the branches of `torch.cond` for operands with the strides of capture, but lays the
operands out as it likes: a choice between `2 * x` and `x / 2` behind `x = y.mT.contiguous()` gives
other numbers (seen in 2.13). While `exact_operands` holds, operands get the strides of capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx


@contextlib.contextmanager
def exact_operands() -> Iterator[None]:
    """Compile choices with operands as they were captured; not for several threads at once."""
    from torch._inductor import ir  # slow to import, and needed by those alone who compile
    from torch._inductor.virtualized import V

    own, create = ir.Conditional.__dict__["create"], ir.Conditional.create

    def exact(operand: Any, node: Any) -> Any:
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor):
            return operand  # a size
        return ir.ExternKernel.require_exact_strides(operand, value.stride(), allow_padding=False)

    def laid_out(predicate: Any, true_fn: Any, false_fn: Any, operands: Sequence[Any]) -> Any:
        sources: Any = V.graph.current_node.args[-1]
        given = [exact(x, node) for x, node in zip(operands, sources, strict=True)]
        return create(predicate, true_fn, false_fn, given)

    ir.Conditional.create = staticmethod(laid_out)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ir.Conditional.create = own  # type: ignore[method-assign]
