"""How a program is called: named arguments in, one nested value out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import OptionError
from .structure import Structure


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one flat input.

    Attributes:
        name: Name of the graph's placeholder.
        dtype: Element type.
        shape: One entry per dimension: a size, or the name of a symbol for a dynamic one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Argument:
    """One argument of the model's `forward`.

    Attributes:
        name: Parameter name in `forward`, or `args.3` for the fourth of `*args`.
        positional: Whether the example gave it by position.
        structure: Nesting of the value.
        leaves: One entry per leaf: the spec of a tensor, or the constant capture specialised on.
    """

    name: str
    positional: bool
    structure: Structure
    leaves: tuple[TensorSpec | int | float | bool | str | None, ...]


@dataclass(frozen=True)
class Signature:
    """Arguments and result of a program.

    Attributes:
        arguments: Captured arguments, in calling order.
        outputs: Nesting of the result; its leaves are the graph's outputs.
        constants: Leaves of the result that are no tensors, by leaf index.
        parameters: Names `forward` accepts by position, in order.
        ranges: Smallest and largest size (None: no limit) of each symbol.
        symbols: Name shown for a symbol of the graph, as in `s43` to `batch`.
    """

    arguments: tuple[Argument, ...]
    outputs: Structure
    constants: Mapping[int, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    symbols: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tensor inputs in graph order."""
        return tuple(
            leaf for arg in self.arguments for leaf in arg.leaves if isinstance(leaf, TensorSpec)
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Check a call against the captured arguments and return its tensors in graph order.

        Raises:
            OptionError: An argument is missing, unknown, or differs in structure, type, shape or
                in a constant that capture specialised on.
        """
        given = self._named(args, kwargs)
        tensors: list[Tensor] = []
        sizes: dict[str, int] = {}
        for argument in self.arguments:
            if argument.name not in given:
                raise OptionError(
                    f"argument {argument.name!r} is missing.",
                    remedy=f"call with {', '.join(a.name for a in self.arguments)}.",
                )
            value = given.pop(argument.name)
            leaves, spec = pytree.tree_flatten(value)
            if Structure.from_spec(spec) != argument.structure:
                raise OptionError(
                    f"argument {argument.name!r} has another structure than the captured one.",
                    remedy="pass tuples, lists and dicts nested as in example_inputs.",
                )
            for path, leaf, expected in zip(
                argument.structure.paths(argument.name), leaves, argument.leaves, strict=True
            ):
                if isinstance(expected, TensorSpec):
                    tensors.append(self._check_tensor(path, leaf, expected, sizes))
                elif type(leaf) is not type(expected) or leaf != expected:
                    raise OptionError(
                        f"argument {path!r} is {leaf!r}; the program was captured for"
                        f" {expected!r}, a constant of the graph.",
                        remedy="capture again with the value you need.",
                    )
        unknown = [name for name, value in given.items() if value is not None]
        if unknown:
            raise OptionError(
                f"argument {unknown[0]!r} was not captured.",
                remedy="give it in example_inputs when capturing, or leave it out.",
            )
        return tensors

    def pack(self, leaves: Sequence[Tensor]) -> Any:
        """Return flat outputs in the structure the model returns."""
        if not self.constants:
            return self.outputs.build(leaves)
        tensors = iter(leaves)
        count = range(self.outputs.leaves)
        return self.outputs.build(
            [self.constants[i] if i in self.constants else next(tensors) for i in count]
        )

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = list(self.parameters)
        names += [f"args.{index}" for index in range(len(names), len(args))]
        given = dict(zip(names, args, strict=False))
        repeated = given.keys() & kwargs.keys()
        if repeated:
            raise OptionError(f"argument {min(repeated)!r} is given twice.")
        return given | dict(kwargs)

    def _check_tensor(
        self, path: str, value: Any, spec: TensorSpec, sizes: dict[str, int]
    ) -> Tensor:
        if not isinstance(value, Tensor):
            raise OptionError(f"argument {path!r} is a {type(value).__name__}, not a tensor.")
        if value.dtype != spec.dtype:
            raise OptionError(
                f"argument {path!r} is {value.dtype}, the program takes {spec.dtype}.",
                remedy=f"convert it with .to({spec.dtype}).",
            )
        fits = value.dim() == len(spec.shape) and all(
            sizes.setdefault(expected, size) == size and self._in_range(expected, size)
            if isinstance(expected, str) and expected.isidentifier()
            else isinstance(expected, str) or expected == size
            for size, expected in zip(value.shape, spec.shape, strict=True)
        )
        if not fits:
            raise OptionError(
                f"argument {path!r} has shape {list(value.shape)}, the program takes"
                f" [{', '.join(map(str, spec.shape))}]{self._ranges_of(spec)}.",
                remedy="give sizes within the captured ranges, or capture with dynamic_shapes.",
            )
        return value

    def _in_range(self, symbol: str, size: int) -> bool:
        low, high = self.ranges.get(symbol, (0, None))
        return low <= size and (high is None or size <= high)

    def _ranges_of(self, spec: TensorSpec) -> str:
        known = [d for d in spec.shape if isinstance(d, str) and d in self.ranges]
        texts = [f"{d} in {self.ranges[d][0]}..{self.ranges[d][1] or 'any'}" for d in known]
        return f" with {', '.join(texts)}" if texts else ""
