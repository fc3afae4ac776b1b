"""Calls of a program from the command line: random or from a file in, a file or figures out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..backends.engine import Engine
from ..ir.errors import OptionError
from ..ir.program import Program
from ..ir.signature import TensorSpec
from .cli_inputs import InputSpec, make_inputs

FORMATS = (".safetensors", ".npz")


def tensor_inputs(program: Program) -> dict[str, TensorSpec]:
    """Return the tensor inputs of a program by dotted path, as in `past.0.key`."""
    return {
        path: leaf
        for argument in program.signature.arguments
        for path, leaf in zip(argument.structure.paths(argument.name), argument.leaves, strict=True)
        if isinstance(leaf, TensorSpec)
    }


def random_tensors(
    program: Program, sizes: Mapping[str, int], vocab: int | None, seed: int
) -> dict[str, Tensor]:
    """Return random inputs of a program by path.

    Args:
        program: What will be called.
        sizes: Dynamic sizes that differ from the example's.
        vocab: Limit of integers; None to read it off the embedding tables.
        seed: Equal seeds give equal inputs.

    Raises:
        OptionError: There is no dynamic size of that name.
    """
    require_sizes(program, sizes)
    values, rows = program.sizes() | dict(sizes), embedding_rows(program)
    inputs = tensor_inputs(program)
    specs = []
    for path, spec in inputs.items():
        shape = tuple(values.get(d, 2) if isinstance(d, str) else d for d in spec.shape)
        specs.append(InputSpec(path, spec.dtype, shape, (None,) * len(shape)))
    limits = {path: vocab or rows.get(spec.name, 2) for path, spec in inputs.items()}
    return make_inputs(specs, limits, seed)


def require_sizes(program: Program, sizes: Mapping[str, int]) -> None:
    """Refuse sizes the program does not have.

    Raises:
        OptionError: Names the first.
    """
    known = program.sizes()
    unknown = sorted(sizes.keys() - known.keys())
    if unknown:
        have = f"use {', '.join(known)}." if known else "every size of this program is fixed."
        raise OptionError(f"there is no dynamic size {unknown[0]!r}.", remedy=have)


def embedding_rows(program: Program) -> dict[str, int]:
    """Return how many rows the table has in which a placeholder is looked up."""
    rows: dict[str, int] = {}
    for node in program.main.nodes:
        if node.op != "call_function" or "embedding" not in str(node.target):
            continue
        tables = [n for n in node.all_input_nodes if n.op == "get_attr"]
        ids = [n for n in node.all_input_nodes if n.op == "placeholder"]
        if tables and ids:
            count = program.weight(str(tables[0].target)).shape[0]
            rows[ids[0].name] = min(rows.get(ids[0].name, count), count)
    return rows


def caller(engine: Engine, tensors: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Return a call of an engine on tensors by path; state, if any, goes on from call to call.

    Raises:
        OptionError: A tensor is missing or belongs to no argument.
    """
    call = as_call(engine.program, tensors)
    target = engine.session() if engine.program.state else engine
    return lambda: target(**call)


def as_call(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return keyword arguments of a program from tensors by path.

    Raises:
        OptionError: A tensor is missing or belongs to no argument.
    """
    known = tensor_inputs(program)
    missing, unknown = sorted(known.keys() - tensors.keys()), sorted(tensors.keys() - known.keys())
    if missing or unknown:
        what = f"there is no input {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        raise OptionError(f"{what}.", remedy=f"give {', '.join(known)}.")
    call: dict[str, Any] = {}
    for argument in program.signature.arguments:
        paths = argument.structure.paths(argument.name)
        leaves = [tensors.get(p, leaf) for p, leaf in zip(paths, argument.leaves, strict=True)]
        call[argument.name] = argument.structure.build(leaves)
    return call


def named_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a nested value by dotted path; a bare one is called `output`."""
    if isinstance(value, Tensor):
        return {prefix or "output": value}
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, tuple | list):
        children = list(enumerate(value))
    else:
        children = []
    dot = f"{prefix}." if prefix else ""
    return {
        path: tensor
        for key, child in children
        for path, tensor in named_tensors(child, f"{dot}{key}").items()
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or npz file by name.

    Raises:
        OptionError: The file cannot be read.
    """
    require_format(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise OptionError(f"cannot read {path}: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors or npz file, whole or not at all.

    Raises:
        OptionError: The file cannot be written, or the format has no such type.
    """
    require_format(path)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            file = Path(folder) / path.name
            if path.suffix == ".safetensors":
                # Clones, as safetensors refuses tensors that share storage.
                safetensors.torch.save_file({name: kept[name].clone() for name in kept}, file)
            else:
                np.savez(file, **{name: _array(name, tensor) for name, tensor in kept.items()})
            os.replace(file, path)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error}.") from error


def require_format(path: Path) -> None:
    """Refuse a file that is neither safetensors nor npz.

    Raises:
        OptionError: Names the formats.
    """
    if path.suffix not in FORMATS:
        raise OptionError(
            f"{path} has no known format.",
            remedy=f"use a name that ends in {' or '.join(FORMATS)}.",
        )


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Return shape, type and a few figures of a tensor."""
    data: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if tensor.numel() and not tensor.is_complex():
        values = tensor.double()
        data |= {
            "min": values.min().item(),
            "max": values.max().item(),
            "mean": values.mean().item(),
            "std": values.std(correction=0).item(),
            "nonfinite": int((~values.isfinite()).sum()),
        }
    return data


def relative_error(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float | None:
    """Return the largest relative L2 difference of outputs; None when they do not correspond."""
    if outputs.keys() != reference.keys():
        return None
    worst = 0.0
    for name, tensor in outputs.items():
        expected = reference[name].double()
        if tensor.shape != expected.shape:
            return None
        scale = expected.norm().item() or 1.0
        worst = max(worst, (tensor.double() - expected).norm().item() / scale)
    return worst


def _array(name: str, tensor: Tensor) -> Any:
    try:
        return tensor.numpy()
    except TypeError as error:
        raise OptionError(
            f"npz has no type for the output {name!r} ({tensor.dtype}).",
            remedy="write a .safetensors file.",
        ) from error
