"""Hashes of what nodes compute, equal for isomorphic regions.

A region is written down in the order in which its results ask for their arguments, so neither the
names of nodes nor their order in the graph matters. Ops, literals, types and shapes enter; weights
enter by type and shape alone. Linear in the nodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from .calls import op

_COMMUTES = {"add", "mul"}


def structure_of(nodes: Iterable[fx.Node], results: Iterable[fx.Node]) -> str:
    """Hash what nodes compute: 16 hexadecimal digits.

    Args:
        nodes: The nodes, in graph order.
        results: Values among them, in an order that has a meaning; what they do not ask for is
            left out.
    """
    writer = _Writer(frozenset(nodes))
    for node in results:
        writer.write(node)
    return hashlib.sha256("\n".join(writer.lines).encode()).hexdigest()[:16]


def weights_of(nodes: Iterable[fx.Node], results: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the `get_attr` nodes that results ask for: one for one those of isomorphic regions.

    Args:
        nodes: The nodes, in graph order.
        results: As in `structure_of`.
    """
    writer = _Writer(frozenset(nodes))
    for node in results:
        writer.write(node)
    return [node for node in writer.numbers if node.op == "get_attr"]


class _Writer:
    """Writes nodes down, each behind its arguments, numbered as they come."""

    def __init__(self, inside: frozenset[fx.Node]) -> None:
        self.inside = inside
        self.lines: list[str] = []
        self.numbers: dict[fx.Node, int] = {}
        self.symbols: dict[str, int] = {}

    def write(self, result: fx.Node) -> None:
        """Write a node and everything it asks for; no recursion, blocks are deep."""
        pending = [result]
        while pending:
            node = pending[-1]
            wanted = _arguments(node) if node in self.inside else []
            missing = [n for n in wanted if n not in self.numbers]
            if node in self.numbers or not missing:
                pending.pop()
                self._line(node)
            else:
                pending.append(missing[0])

    def _line(self, node: fx.Node) -> None:
        if node in self.numbers:
            return
        kind = "weight" if node.op == "get_attr" else "input"
        if node in self.inside:
            given: Any = (node.args, node.kwargs)
            args, kwargs = fx.node.map_arg(given, self._place)
            if op(node) in _COMMUTES and all(isinstance(a, _Place) for a in args):
                args = tuple(sorted(args))
            literals = self._literal((args, sorted(kwargs.items())))
            kind = f"{node.target} {literals}"
        self.numbers[node] = len(self.numbers)
        self.lines.append(f"{kind} {self._value(node.meta.get('val'))}")

    def _place(self, node: fx.Node) -> Any:
        return _Place(f"%{self.numbers[node]}")

    def _value(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}{[self._size(size) for size in value.shape]}"
        if isinstance(value, tuple | list):
            return str([self._value(part) for part in value])
        return self._size(value)

    def _literal(self, value: Any) -> str:
        if isinstance(value, tuple | list):
            return f"({', '.join(self._literal(part) for part in value)})"
        return self._size(value)

    def _size(self, size: Any) -> str:
        """Return a size, symbols numbered as they come."""
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(size)
        expression = size.node.expr
        names = sorted(map(str, getattr(expression, "free_symbols", ())))
        numbered = {name: self.symbols.setdefault(name, len(self.symbols)) for name in names}
        return f"{expression.xreplace({})}" if not numbered else _renamed(expression, numbered)


class _Place(str):
    """A reference to an earlier line."""

    __slots__ = ()


def _renamed(expression: Any, numbers: dict[str, int]) -> str:
    names = {s: type(s)(f"d{numbers[str(s)]}") for s in expression.free_symbols}
    return str(expression.xreplace(names))


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found
