"""Marks: opaque ops that say, in an exported graph, where blocks begin, end and are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


class Layout(NamedTuple):
    """Everything about a tensor but its values."""

    size: Any
    stride: Any
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Self:
        """Return the layout of a tensor."""
        return cls(value.size(), value.stride(), value.dtype, value.device)

    def empty(self) -> Tensor:
        """Return a tensor of this layout."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """Return a real tensor of the example size, laid out in the same way."""
        size, stride = ([_hint(n) for n in numbers] for numbers in (self.size, self.stride))
        length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        store = torch.zeros(max(length, 0), dtype=self.dtype, device=self.device)
        return store.as_strided(size, stride)


class Given(NamedTuple):
    """What a block is called with.

    Attributes:
        leaves: Tensors and constants.
        spec: How they are nested.
        key: Equal for calls that differ in the values of tensors alone.
    """

    leaves: Sequence[Any]
    spec: pytree.TreeSpec
    key: object

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class Kind:
    """What equal blocks have in common.

    Attributes:
        number: Position of their group.
        block: The one that runs.
        path: Its module path.
        given: What it was called with.
        results: What it returned: None, a new tensor, or the position of a tensor it was given.
        returned: How they are nested.
    """

    number: int
    block: nn.Module
    path: str
    given: Given
    results: Sequence[FakeTensor | int | None] = ()
    returned: pytree.TreeSpec | None = None

    @property
    def outputs(self) -> list[FakeTensor]:
        """The new tensors among its results."""
        return [result for result in self.results if isinstance(result, FakeTensor)]

    def pack(self, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """Return what the block returns for the tensors it is given and the new ones it makes."""
        assert self.returned is not None
        new = iter(outputs)
        results = [
            given[x] if isinstance(x, int) else None if x is None else next(new)
            for x in self.results
        ]
        return pytree.tree_unflatten(results, self.returned)


class Value(NamedTuple):
    """One output of a call."""

    call: Call
    position: int

    @property
    def settled(self) -> Tensor:
        """The tensor of the graph."""
        assert self.call.settled is not None
        return self.call.settled[self.position]


@dataclass(eq=False)
class Call:
    """One call of a block that does not run.

    Attributes:
        kind: What it computes.
        path: Module path of the block.
        block: The block.
        inputs: What it is given, in order: tensors of the graph, and outputs of other calls.
        number: Its place among all calls.
        settled: Its outputs as tensors of the graph, once something asked for them.
    """

    kind: Kind
    path: str
    block: nn.Module
    inputs: Sequence[Tensor | Value]
    number: int
    settled: list[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Mark:
    """What one opaque op in the graph stands for.

    Attributes:
        kind: Which blocks this is about.
        role: `enter` and `leave` frame the block that runs; `calls` stands for others.
        calls: Those calls, inputs first; the outputs of the last are what the mark returns.
        leaves: Identity of each tensor the mark is given.
    """

    kind: Kind
    role: str
    calls: Sequence[Call] = ()
    leaves: Sequence[int] = ()


@torch.library.custom_op("blockwright::mark", mutates_args=())
def mark(values: list[Tensor], index: int) -> list[Tensor]:
    """Stand in the graph for entry `index` of the marks being recorded; never runs."""
    raise AssertionError("blockwright::mark only exists while a model is captured")


@mark.register_fake
def _(values: list[Tensor], index: int) -> list[Tensor]:
    found = _recorded[-1][index]
    like = values if found.role == "enter" else found.kind.outputs
    return [Layout.of(value).empty() for value in like]


@contextlib.contextmanager
def recorded(marks: list[Mark]) -> Iterator[None]:
    """Let `put` add to a list of marks."""
    _recorded.append(marks)
    try:
        yield
    finally:
        _recorded.pop()


def put(entry: Mark, values: Sequence[Tensor]) -> list[Tensor]:
    """Put a mark into the graph that is being traced, and return its outputs."""
    _recorded[-1].append(entry)
    return list(torch.ops.blockwright.mark(list(values), len(_recorded[-1]) - 1))


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


_recorded: list[list[Mark]] = []
