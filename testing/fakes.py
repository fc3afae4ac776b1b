"""Shapes for programs that are built directly: one set of symbols, every shape derived once.

What an op does to shapes takes milliseconds to derive when sizes are symbolic, and random models
ask for the same again and again. All of them share the two symbols, and so what is known of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.propagate import Values
from ..ir.verify import derive

SIZES = {"batch": 2, "seq": 3}
"""Example sizes of the dynamic dimensions."""
LIMIT = 64
"""Largest size of a dynamic dimension."""
SYMBOLS = {"s0": "batch", "s1": "seq"}


class Fakes:
    """Fake tensors in one mode."""

    def __init__(self) -> None:
        self._values = Values({s: [SIZES[name], 1, LIMIT] for s, name in SYMBOLS.items()})
        self._made: dict[Any, Tensor] = {}

    def tensor(self, dtype: torch.dtype, shape: tuple[int | str, ...]) -> Tensor:
        """Return a fake tensor; strings in its shape are names of dynamic dimensions."""
        if (dtype, shape) not in self._made:
            symbols = {name: symbol for symbol, name in SYMBOLS.items()}
            described = {
                "dtype": str(dtype).removeprefix("torch."),
                "device": "cpu",
                "shape": [symbols[size] if isinstance(size, str) else size for size in shape],
            }
            with self._values.mode:
                self._made[dtype, shape] = self._values.placeholder(described)
        return self._made[dtype, shape]

    def derive(self, node: fx.Node) -> Any:
        """Return the fake result of a node from those its arguments record."""
        return derive(node, {n: n.meta["val"] for n in node.all_input_nodes}, self._values.mode)

    @property
    def settled(self) -> dict[str, str]:
        """What something found out about the symbols, which nothing may, in words."""
        env: Any = self._values.env
        found = {str(symbol): f"is {value}" for symbol, value in env.replacements.items()}
        for symbol, limits in env.var_to_range.items():
            if (limits.lower, limits.upper) != (1, LIMIT):
                found[str(symbol)] = f"in {limits.lower}..{limits.upper}"
        return found


@cache
def fakes() -> Fakes:
    """Return the fake tensors that all programs share."""
    return Fakes()
