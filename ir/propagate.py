"""Rebuild the shapes of a program whose graphs carry none, by running them on fake tensors.

A graph read from a file says what each node does, not what comes out. Inputs get symbolic sizes
again, symbols of one name being one symbol, and every graph is run once: the main graph as it is,
a class graph on the values of its first call.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .branches import branches_of, is_cond, operands_of
from .errors import ArtefactError
from .graphs import output_nodes
from .literals import device_from, dtype_from
from .program import MAIN, Instance, Program
from .shapes import Size, describe

LARGEST = 2**62


def describe_symbols(program: Program) -> dict[str, list[int | None]]:
    """Return example size, smallest and largest size of every symbol, by its name in the graph."""
    found: dict[str, list[int | None]] = {}
    shapes = [node.meta["val"].shape for node in _placeholders(program.main)]
    for size in (size for shape in shapes for size in shape if isinstance(size, torch.SymInt)):
        env = size.node.shape_env
        for symbol in size.node.expr.free_symbols:
            limits = env.var_to_range[symbol]
            hint = int(env.create_symintnode(symbol, hint=None).node.hint)
            high = int(limits.upper) if limits.upper < LARGEST else None
            found[symbol.name] = [hint, int(limits.lower), high]
    return found


def describe_value(value: Tensor) -> dict[str, Any]:
    """Return an input's type, device and shape; `Values.placeholder` reads it back."""
    shape = [str(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in value.shape]
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(value.device), "shape": shape}


class Values:
    """Fills in `meta["val"]` of all nodes of a program."""

    def __init__(self, symbols: Mapping[str, Any]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_fallback_kernels=False)
        self.sizes = {name: self._symbol(name, *limits) for name, limits in symbols.items()}
        self.weights: dict[str, Tensor] = {}
        self.results: dict[str, tuple[Any, ...]] = {}
        self.slots: dict[str, dict[str, object]] = {}

    def fill(self, program: Program, inputs: Mapping[str, Any]) -> None:
        """Run the program.

        Args:
            program: Its nodes are given values.
            inputs: What `describe_value` said of each of main's placeholders, by node name.

        Raises:
            ArtefactError: A node does not fit its inputs.
        """
        with torch.no_grad(), self.mode, self.env.suppress_guards():
            for name, data in inputs.items():
                inputs = {**inputs, name: self.placeholder(data)}
            self._graph(program, MAIN, None, [inputs[n.name] for n in _placeholders(program.main)])

    def placeholder(self, data: Mapping[str, Any]) -> Tensor:
        """Return the fake input that `describe_value` described."""
        shape: list[Any] = [self.size(item) for item in data["shape"]]
        return torch.empty(
            shape, dtype=dtype_from(data["dtype"]), device=device_from(data["device"])
        )

    def size(self, text: int | str) -> Size:
        """Return a size: an integer, or an expression over symbols."""
        return text if isinstance(text, int) else evaluate(text, self.sizes)

    def _symbol(self, name: str, hint: int, low: int, high: int | None) -> torch.SymInt:
        if not re.fullmatch(r"s\d{1,9}", name, re.ASCII) or not low <= hint <= (high or LARGEST):
            raise ArtefactError(f"symbol {name[:40]!r} is malformed.")
        symbol = sympy.Symbol(name, positive=True, integer=True)
        add = getattr(self.env, "add_backed_var_to_val", None) or self.env.add_var_to_val
        add(symbol, hint)
        self.env.constrain_symbol_range(symbol, compiler_min=low, compiler_max=high or LARGEST)
        size = self.env.create_symintnode(symbol, hint=hint)
        assert isinstance(size, torch.SymInt)
        return size

    def _graph(
        self, program: Program, key: str, instance: str | None, inputs: list[Any]
    ) -> tuple[Any, ...]:
        graph = program.graphs[key]
        for node, value in zip(_placeholders(graph), inputs, strict=True):
            node.meta["val"] = value
        for node in graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = self._weight(program, str(node.target), instance)
            elif node.op == "call_module":
                node.meta["val"] = self._call(program, node)
            elif is_cond(node):
                node.meta["val"] = self._choose(program, node, instance)
            elif node.op == "call_function":
                node.meta["val"] = _run(node)
        return tuple(node.meta["val"] for node in output_nodes(graph))

    def _choose(self, program: Program, node: fx.Node, instance: str | None) -> tuple[Any, ...]:
        """Return what either branch gives."""
        given = [operand.meta["val"] for operand in operands_of(node)]
        first, second = (self._graph(program, b, instance, given) for b in branches_of(node))
        if describe(first) != describe(second):
            raise ArtefactError("two branches give values of other shapes.", where=node.name)
        return first

    def _call(self, program: Program, node: fx.Node) -> tuple[Any, ...]:
        """Return the outputs of a block; propagate its class at the first call."""
        name = str(node.target)
        instance = program.instances[name]
        inputs = [argument.meta["val"] for argument in node.args]  # type: ignore[union-attr]
        if instance.block not in self.results:
            self.results[instance.block] = self._graph(program, instance.block, name, inputs)
            self.slots[instance.block] = _shapes(program, instance)
        expected = [n.meta["val"] for n in _placeholders(program.graphs[instance.block])]
        if list(map(describe, inputs)) != list(map(describe, expected)):
            raise ArtefactError("the block is called with other shapes than before.", where=name)
        if _shapes(program, instance) != self.slots[instance.block]:
            raise ArtefactError("the block has weights of other shapes than its class.", where=name)
        return self.results[instance.block]

    def _weight(self, program: Program, slot: str, instance: str | None) -> Tensor:
        name = program.instances[instance].weights[slot] if instance else slot
        if name not in self.weights:
            self.weights[name] = self.mode.from_tensor(program.tensors[name], static_shapes=True)
        return self.weights[name]


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """Evaluate a size: integers, names, `+ - * // %`, `Min` and `Max`; never by `eval`.

    Raises:
        ArtefactError: The text holds anything else.
    """
    try:
        return _evaluate(ast.parse(text[:1000], mode="eval").body, names)
    except (SyntaxError, ValueError, KeyError, RecursionError, ZeroDivisionError) as error:
        raise ArtefactError(f"{text[:80]!r} is not a size.") from error


def _evaluate(tree: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name):
        return names[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_evaluate(tree.operand, names)
    if isinstance(tree, ast.BinOp):
        operation = _OPERATORS[type(tree.op)]
        return operation(_evaluate(tree.left, names), _evaluate(tree.right, names))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and len(tree.args) == 2:
        function = _FUNCTIONS[tree.func.id]
        return function(*(_evaluate(argument, names) for argument in tree.args))
    raise ValueError(type(tree).__name__)


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Min": torch.sym_min,
    "Max": torch.sym_max,
    "Mod": operator.mod,
}


def _run(node: fx.Node) -> Any:
    """Run one node on the values of its arguments."""
    assert callable(node.target)
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = values
    if node.target is operator.pow and isinstance(args[1], int) and not 0 <= args[1] <= 8:
        raise ArtefactError(f"the power {args[1]} is too large.", where=node.name)
    try:
        value = node.target(*args, **kwargs)
    except Exception as error:  # a file may ask any op for anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(
            f"{node.target} does not fit its inputs: {reason}", where=f"node {node.name}"
        ) from error
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ArtefactError("a size does not fit 63 bits.", where=f"node {node.name}")
    return value


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _shapes(program: Program, instance: Instance) -> dict[str, object]:
    return {slot: describe(program.tensors[name]) for slot, name in instance.weights.items()}
