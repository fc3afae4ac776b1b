"""Inputs as written on a command line.

--input 'input_ids=int64[batch=2, seq=16]'     type and sizes; a named size is dynamic
--input 'pixels=float32[1, 3, 224, 224]'
--dynamic 'input_ids:0=batch,1=seq'            names axes of an input the model offers
--dynamic 'batch=1..64,seq=2..'                how far a dynamic size may go
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import OptionError

_SHORT = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
          "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8"}  # fmt: skip
_TYPES = {*_SHORT.values(), "bool"}
_INPUT = re.compile(r"\s*([\w.]+)\s*=\s*(\w+)\s*\[(.*)\]\s*")
_SIZE = re.compile(r"(?:([A-Za-z_]\w*)\s*=\s*)?(\d+)")
_AXIS = re.compile(r"(?:([\w.*?]+)\s*:\s*)?(\d+)\s*=\s*([A-Za-z_]\w*)")
_RANGE = re.compile(r"([A-Za-z_]\w*)\s*=\s*(\d+)\s*\.\.\s*(\d*)")

Axes = Mapping[tuple[str, int], str]
Range = tuple[int, int | None]


@dataclass(frozen=True)
class InputSpec:
    """One input to make up.

    Attributes:
        name: Parameter of the model's `forward`.
        dtype: Element type.
        shape: Example sizes.
        names: Name of each dynamic size, None for a fixed one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Dynamic:
    """Which sizes may change.

    Attributes:
        axes: Name of the size by input (or glob pattern) and axis.
        ranges: Smallest and largest value by name; None for no limit.
    """

    axes: Axes
    ranges: Mapping[str, Range]


def parse_input(text: str) -> InputSpec:
    """Read `name=dtype[size, ...]`.

    Raises:
        OptionError: The text is malformed, or the type unknown.
    """
    match = _INPUT.fullmatch(text)
    parts = [part.strip() for part in match[3].split(",")] if match and match[3].strip() else []
    sizes = [_SIZE.fullmatch(part) for part in parts]
    if match is None or not all(sizes):
        raise OptionError(
            f"cannot read the input {text!r}.",
            remedy="write it as ids=int64[2,16], or ids=int64[batch=2,seq=16] for dynamic sizes.",
        )
    dtype = _SHORT.get(match[2], match[2])
    if dtype not in _TYPES:
        raise OptionError(
            f"input {match[1]}: there is no type {match[2]!r}.",
            remedy=f"use one of {', '.join(sorted(_TYPES))}.",
        )
    found = [size for size in sizes if size]
    shape, names = tuple(int(size[2]) for size in found), tuple(size[1] for size in found)
    return InputSpec(match[1], getattr(torch, dtype), shape, names)


def parse_dynamic(texts: Iterable[str]) -> Dynamic:
    """Read `input:axis=name,axis=name` and `name=low..high`, comma-separated.

    Raises:
        OptionError: The text is malformed.
    """
    axes: dict[tuple[str, int], str] = {}
    ranges: dict[str, Range] = {}
    for text in texts:
        current: str | None = None
        for part in map(str.strip, text.split(",")):
            axis, limits = _AXIS.fullmatch(part), _RANGE.fullmatch(part)
            if limits:
                ranges[limits[1]] = (int(limits[2]), int(limits[3]) if limits[3] else None)
            elif axis and (axis[1] or current):
                current = axis[1] or current
                axes[str(current), int(axis[2])] = axis[3]
            else:
                raise OptionError(
                    f"cannot read {part!r} in --dynamic {text!r}.",
                    remedy="write input_ids:0=batch,1=seq to name axes, batch=1..64 for a range.",
                )
    return Dynamic(axes, ranges)


def parse_sizes(text: str | None) -> dict[str, int]:
    """Read `batch=8,seq=128`.

    Raises:
        OptionError: The text is malformed.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, map(str.strip, (text or "").split(","))):
        match = _SIZE.fullmatch(part)
        if match is None or match[1] is None:
            raise OptionError(f"cannot read the size {part!r}.", remedy="write batch=8,seq=128.")
        sizes[match[1]] = int(match[2])
    return sizes


def make_inputs(
    specs: Sequence[InputSpec], vocab: Mapping[str, int] | int, seed: int = 0
) -> dict[str, Tensor]:
    """Return random tensors by name.

    Args:
        specs: What to make.
        vocab: Integers stay below it; by input name where inputs differ.
        seed: Equal seeds give equal inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = vocab if isinstance(vocab, Mapping) else dict.fromkeys((s.name for s in specs), vocab)
    return {s.name: random_tensor(s, limits.get(s.name, 2), generator) for s in specs}


def random_tensor(spec: InputSpec, vocab: int, generator: torch.Generator) -> Tensor:
    """Return a value that is valid for what the input's name says it is.

    Masks are ones, token types zeros, positions count up; other integers are drawn below `vocab`
    and floats from a normal distribution.
    """
    name, dtype, shape = spec.name, spec.dtype, spec.shape
    if "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if "token_type" in name:
        return torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).expand(shape).to(dtype).contiguous()
    high = min(2 if dtype == torch.bool else vocab, torch.iinfo(torch.int64).max)
    if dtype != torch.bool:
        high = min(high, torch.iinfo(dtype).max)
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def vocabulary(model: nn.Module) -> int:
    """Return a limit below which integers are valid ids.

    It is the configuration's vocabulary, else the smallest embedding table, else 2.
    """
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    size = getattr(text, "vocab_size", None)
    if isinstance(size, int) and size > 0:
        return size
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return min(tables, default=2)


def dynamic_shapes(
    dynamic: Dynamic, specs: Sequence[InputSpec], inputs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what `torch.export.export` takes; None when every size is fixed.

    Args:
        dynamic: From `--dynamic`.
        specs: From `--input`.
        inputs: Example value by parameter name.

    Raises:
        OptionError: An input, axis or name is not there, or an example is out of its range.
    """
    named = {(s.name, i): name for s in specs for i, name in enumerate(s.names) if name}
    named |= _expand(dynamic.axes, inputs)
    unused = sorted(dynamic.ranges.keys() - set(named.values()))
    if unused:
        raise OptionError(
            f"--dynamic gives a range for {unused[0]!r}, but no axis is called that.",
            remedy=f"name the axis: --dynamic {next(iter(inputs))}:0={unused[0]}.",
        )
    for (name, axis), size_name in named.items():
        low, high = dynamic.ranges.get(size_name, (0, None))
        size = inputs[name].shape[axis]
        if not low <= size <= (high or size):
            raise OptionError(
                f"{name} has {size_name}={size}, outside {low}..{high or ''}.",
                remedy="change the example's size or the range.",
            )
    dims = {size_name: _dim(size_name, dynamic.ranges) for size_name in named.values()}
    shapes = {
        name: {axis: dims[dim] for (owner, axis), dim in named.items() if owner == name} or None
        for name in inputs
    }
    return shapes if named else None


def _expand(axes: Axes, inputs: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Replace glob patterns by the inputs they match."""
    named: dict[tuple[str, int], str] = {}
    for (pattern, axis), size_name in axes.items():
        matches = [name for name in inputs if fnmatchcase(name, pattern)]
        matches = [name for name in matches if isinstance(inputs[name], Tensor)]
        if not matches:
            raise OptionError(
                f"--dynamic: there is no tensor input {pattern!r}.",
                remedy=f"use one of {', '.join(inputs)}.",
            )
        for name in matches:
            if axis >= inputs[name].dim():
                raise OptionError(
                    f"--dynamic: {name} has {inputs[name].dim()} axes, so there is no axis {axis}."
                )
            named[name, axis] = size_name
    return named


def _dim(name: str, ranges: Mapping[str, Range]) -> Any:
    low, high = ranges.get(name, (None, None))
    return torch.export.Dim(name, min=low, max=high)
