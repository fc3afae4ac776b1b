"""Shapes of graph values: symbolic sizes, their names, and re-derivation by fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from .program import Program

Size = int | torch.SymInt


def dim(size: Size, symbols: Mapping[str, str]) -> int | str:
    """Return a size as an integer, or as an expression over named symbols."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    if expr.is_Symbol:
        return symbols.get(expr.name, expr.name)
    named = {symbol: sympy.Symbol(symbols[symbol.name]) for symbol in expr.free_symbols
             if symbol.name in symbols}  # fmt: skip
    text = str(expr.xreplace(named))
    return int(text) if text.lstrip("-").isdigit() else text


def dims(value: Tensor, symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    """Return a shape with dynamic sizes as expressions over named symbols."""
    return tuple(dim(size, symbols) for size in value.shape)


def example_sizes(program: Program) -> dict[str, int]:
    """Return the size each symbol had in the example inputs, by shown name."""
    sizes: dict[str, int] = {}
    for node in program.main.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for size in value.shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                name = program.signature.symbols.get(str(size.node.expr), str(size.node.expr))
                sizes[name] = int(size.node.hint)
    return sizes


def concrete(program: Program, sizes: Mapping[str, int] | None) -> Callable[[Size], int]:
    """Return a function that evaluates any size of the program, at the example by default.

    Args:
        program: Where the symbols come from.
        sizes: Size by shown symbol name, for those that differ from the example.
    """
    values = program.sizes() | dict(sizes or {})
    names = {shown: symbol for symbol, shown in program.signature.symbols.items()}
    table = {sympy.Symbol(names.get(name, name)): size for name, size in values.items()}
    memo: dict[Any, int] = {}

    def evaluate(size: Size) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        if expr not in memo:
            by_name = {s: table[sympy.Symbol(s.name)] for s in expr.free_symbols
                       if sympy.Symbol(s.name) in table}  # fmt: skip
            result = expr.subs(by_name)
            memo[expr] = int(result) if result.is_number else int(size.node.hint)
        return memo[expr]

    return evaluate


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode a graph was captured in, with its symbols.

    Raises:
        ValueError: No node records a fake value.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise ValueError("the graph records no shapes")


def describe(value: object) -> object:
    """Return what must agree between a recorded and a re-derived value: shape, type, device."""
    if isinstance(value, Tensor):
        shape = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape)
        return (shape, value.dtype, value.device.type)
    if isinstance(value, torch.SymInt) and value.node.expr.is_Integer:
        return int(value.node.expr)  # no longer dynamic
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return (type(value).__name__, value.node.expr)
    if isinstance(value, tuple | list):
        return tuple(map(describe, value))
    return value
