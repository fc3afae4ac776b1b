"""Inputs at several sizes, for a graph whose dynamic dimensions have names.

Values follow those of the example: counted positions go on counting, a mask of ones stays one, ids
and floats are drawn from the example's range.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir.errors import OptionError
from .foreign import Port

BATCHES = (1, 2, 3)  # sizes tried of a first axis; ORT and exporters treat 1 apart
_BEYOND = 3  # elements more than an attention window
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
Sizes = Mapping[str, int]


def place_inputs(ports: Sequence[Port], names: Sequence[str], flat: Sequence[Tensor]) -> list[int]:
    """Return, for every foreign input, which of the model's inputs it is: by name, else by place.

    Args:
        ports: Inputs of the foreign graph.
        names: Inputs of the model.
        flat: Example tensors of the model.

    Raises:
        OptionError: The inputs do not correspond.
    """
    if all(port.name in names for port in ports):
        places = [list(names).index(port.name) for port in ports]
    elif len(ports) == len(names):
        places = list(range(len(names)))
    else:
        raise OptionError(
            f"the graph takes {[p.name for p in ports]}, the model {list(names)}.",
            remedy="capture the model with the inputs the graph was made for.",
        )
    for port, place in zip(ports, places, strict=True):
        value = flat[place]
        same_kind = port.dtype.is_floating_point == value.is_floating_point()
        if value.dim() != len(port.shape) or not same_kind:
            raise OptionError(
                f"input {port.name!r} is {_words(port.dtype, port.shape)} in the graph and"
                f" {_words(value.dtype, value.shape)} in the model.",
                where=names[place],
                remedy="give example inputs of the type and rank the graph takes.",
            )
    return places


def symbols_of(ports: Sequence[Port], flat: Sequence[Tensor]) -> dict[str, int]:
    """Return the size of every named dimension in the example.

    Raises:
        OptionError: The example does not fit the graph.
    """
    found: dict[str, int] = {}
    for port, value in zip(ports, flat, strict=True):
        for size, actual in zip(port.shape, value.shape, strict=True):
            if isinstance(size, str) and (size.isidentifier() or _is_anonymous(size)):
                found.setdefault(str(size), actual)
            if isinstance(size, int) and size != actual:
                raise OptionError(
                    f"the graph takes {port.name!r} as {_words(port.dtype, port.shape)},"
                    f" the example is {_words(value.dtype, value.shape)}.",
                    remedy="give example inputs of the sizes that are fixed in the graph.",
                )
    return found


def sizes_to_try(
    ports: Sequence[Port], symbols: Sizes, windows: Sequence[int] = ()
) -> list[dict[str, int]]:
    """Return sizes to compare at: those of the example, then one dimension varied at a time.

    First axes become 1, 2 and 3; others 1, and larger than the example and all attention windows.
    """
    first = {port.shape[0] for port in ports if port.shape}
    sums = _sums(symbols)
    tried = [dict(symbols)]
    for name, size in symbols.items():
        if name in sums:
            continue
        larger = max(2 * size, max(windows, default=0) + _BEYOND)
        for value in BATCHES if name in first else (1, larger):
            varied = {**symbols, name: value}
            varied |= {total: sum(varied[part] for part in parts) for total, parts in sums.items()}
            if varied not in tried:
                tried.append(varied)
    return tried


def inputs_at(
    ports: Sequence[Port], example: Sequence[Tensor], symbols: Sizes, sizes: Sizes, seed: int
) -> list[Tensor]:
    """Return the example's inputs at other sizes; the example itself at its own.

    Args:
        ports: Inputs of the foreign graph.
        example: A tensor for each.
        symbols: Sizes in the example.
        sizes: Sizes wanted.
        seed: Of random values.
    """
    if dict(symbols) == dict(sizes):
        return list(example)
    generator = torch.Generator().manual_seed(seed)
    shifts = {old: sizes[name] for name, old in symbols.items()}
    made = []
    for port, value in zip(ports, example, strict=True):
        shape = [_evaluate(size, sizes) for size in port.shape]
        made.append(_like(value, shape, shifts, generator))
    return made


def _like(
    example: Tensor, shape: Sequence[int], shifts: Mapping[int, int], generator: torch.Generator
) -> Tensor:
    """Return a tensor of another shape with values of the example's kind."""
    if example.is_floating_point():
        spread = float(example.double().std()) if example.numel() > 1 else 1.0
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * spread + float(example.double().mean() if example.numel() else 0)).to(
            example.dtype
        )
    numbers = example.to(torch.int64)
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 1)
    if low == high:
        return torch.full(shape, low, dtype=example.dtype)
    if example.dim() and bool((numbers.diff(dim=-1) == 1).all()):
        start = shifts.get(low, low) if low else 0
        counted = torch.arange(start, start + shape[-1], dtype=example.dtype)
        return counted.expand(shape).contiguous()
    drawn = torch.randint(low, high + 1, shape, generator=generator)
    return drawn.to(example.dtype)


def _sums(symbols: Sizes) -> dict[str, tuple[str, str]]:
    """Return the names that can only be the sum of two others, as a total of past and new keys."""
    names = list(symbols)
    found: dict[str, tuple[str, str]] = {}
    for total in names:
        pairs = [
            (a, b)
            for i, a in enumerate(names)
            for b in names[i + 1 :]
            if total not in (a, b) and symbols[a] + symbols[b] == symbols[total]
        ]
        if len(pairs) == 1 and not set(pairs[0]) & found.keys():
            found[total] = pairs[0]
    return found


def _is_anonymous(size: str) -> bool:
    """Whether a dimension has the name its input and axis give it, as `x.0`."""
    return "." in size and size.rpartition(".")[2].isdigit()


def _evaluate(size: int | str, sizes: Sizes) -> int:
    """Return a size: a number, a name, or an expression over names as exporters write it."""
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    try:
        return _value(ast.parse(size, mode="eval").body, sizes)
    except (SyntaxError, KeyError) as error:
        raise OptionError(
            f"cannot tell the size {size!r}.", remedy=f"known are {', '.join(sizes)}."
        ) from error


def _value(tree: ast.expr, sizes: Sizes) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp):
        function = _OPERATORS[type(tree.op)]
        return int(function(_value(tree.left, sizes), _value(tree.right, sizes)))
    raise KeyError(ast.dump(tree))


def _words(dtype: torch.dtype, shape: Sequence[int | str]) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
