"""Write a program node by node.

A graph is built in the main graph, as capture does, and repeated blocks are folded at the end.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.fold import fold_blocks
from ..ir.graphs import remove_dead
from ..ir.program import MAIN, Program
from ..ir.signature import Argument, Signature, TensorSpec
from ..ir.structure import Structure
from .fakes import LIMIT, SYMBOLS, fakes

LEAF = Structure("leaf")


class GraphBuilder:
    """A program in the making.

    Attributes:
        dtype: Type of weights and floating-point values.
        sizes: Dimensions by name: numbers, or nodes where they are dynamic.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        sizes: Mapping[str, int],
        dynamic: Sequence[str],
        draw: Callable[[str, tuple[int, ...]], Tensor],
    ) -> None:
        """Start an empty program.

        Args:
            dtype: Type of weights and floating-point values.
            sizes: Example size of every named dimension.
            dynamic: Names of those that are dynamic.
            draw: Returns the weight of a name and shape.
        """
        self.dtype, self.sizes = dtype, dict[str, Any](sizes)
        self._draw = draw
        self._graph, self._path = fx.Graph(), ""
        self._tensors: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        self._buffers: set[str] = set()
        self._weights: dict[str, fx.Node] = {}
        self._inputs: dict[str, TensorSpec] = {}
        self._dynamic = dynamic

    def inputs(self, wanted: Mapping[str, tuple[torch.dtype, Sequence[Any]]]) -> list[fx.Node]:
        """Add the model's arguments, then the sizes of dynamic dimensions.

        Args:
            wanted: Type and shape by name; a string in a shape names a dimension.
        """
        places: dict[str, tuple[fx.Node, int]] = {}
        nodes = []
        for name, (dtype, shape) in wanted.items():
            known = tuple(s if s in self._dynamic else self.sizes.get(s, s) for s in shape)
            self._inputs[name] = TensorSpec(name, dtype, known)
            nodes.append(self._graph.placeholder(name))
            nodes[-1].meta["val"] = fakes().tensor(dtype, known)
            for axis, size in enumerate(known):
                places.pop(size, None)  # capture asks the last input that has a size
                places[size] = (nodes[-1], axis)
        for size in [size for size in places if size in self._dynamic]:
            self.sizes[size] = self(torch.ops.aten.sym_size.int, *places[size])
        return nodes

    def share(self, module: str, other: str) -> None:
        """Let everything in a module, named in full, read the weights of another one."""
        self._shared[f"{module}."] = f"{other}."

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Place what is built inside in the submodule of a name."""
        before = self._path
        self._path = self._below(name)
        try:
            yield
        finally:
            self._path = before

    def weight(self, name: str, *shape: int, buffer: bool = False) -> fx.Node:
        """Return the weight of a name in the module at hand, the same node every time."""
        path = self._below(name)
        for module, other in self._shared.items():
            if path.startswith(module):
                self._aliases[path] = path = other + path.removeprefix(module)
        if path not in self._weights:
            self._tensors[path] = self._draw(path, shape)
            self._weights[path] = self._graph.get_attr(path)
            self._weights[path].meta["val"] = fakes().tensor(self._tensors[path].dtype, shape)
            if buffer:
                self._buffers.add(path)
        return self._weights[path]

    def tie(self, name: str, to: str) -> fx.Node:
        """Give a weight, named in full, a second name in the module at hand."""
        self._aliases[self._below(name)] = to
        return self._weights[to]

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of an op, as in `b(aten.relu.default, x)`."""
        node = self._graph.call_function(op, args, kwargs)
        if self._path:
            node.meta["nn_module_stack"] = {"0": (self._path, "")}
        node.meta["val"] = fakes().derive(node)
        return node

    def several(self, count: int, op: Any, *args: Any) -> list[fx.Node]:
        """Append a call of an op that returns a list, and pick its items."""
        node = self(op, *args)
        return [self(operator.getitem, node, index) for index in range(count)]

    def finish(self, *outputs: fx.Node) -> Program:
        """Return the program, repeated blocks folded."""
        self._graph.output(outputs)
        remove_dead(self._graph)
        used = {str(node.target) for node in self._graph.nodes if node.op == "get_attr"}
        symbols = {s: name for s, name in SYMBOLS.items() if isinstance(self.sizes[name], fx.Node)}
        program = Program(
            graphs={MAIN: self._graph},
            tensors={name: tensor for name, tensor in self._tensors.items() if name in used},
            signature=Signature(
                arguments=tuple(Argument(n, False, LEAF, (s,)) for n, s in self._inputs.items()),
                outputs=LEAF,
                parameters=("x", "mask", "bias", "text", "cond"),
                ranges=dict.fromkeys(symbols.values(), (1, LIMIT)),
                symbols=symbols,
            ),
            aliases={alias: name for alias, name in self._aliases.items() if name in used},
            parameters=frozenset(used - self._buffers),
        )
        return fold_blocks(program)

    def _below(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name
