"""Programs and inputs as files, for directories that are not artefacts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import weights
from ..backends.plainjson import dumps
from ..ir.program import Program
from ..ir.serialize import to_json


def versions() -> dict[str, str]:
    """Return the versions that decide what a pass does."""
    try:
        own = version("blockwright")
    except PackageNotFoundError:
        own = "unknown"
    return {"blockwright": own, "torch": torch.__version__}


def named(sets: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Name the tensors of input sets by set and place: `0.1` is the second of the first set."""
    return {f"{i}.{j}": tensor for i, flat in enumerate(sets) for j, tensor in enumerate(flat)}


def unnamed(tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Undo `named`."""
    sets: dict[int, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, second = name.partition(".")
        sets.setdefault(int(first), {})[int(second)] = tensor
    return [[flat[j] for j in sorted(flat)] for _, flat in sorted(sets.items())]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as copies: the file may go away."""
    return {name: tensor.clone() for name, tensor in weights.read(path).items()}


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor: type, shape and bytes."""
    digest = hashlib.sha256()
    for chunk in weights.chunks({"tensor": tensor}):
        digest.update(chunk)
    return digest.hexdigest()


def graph_hash(program: Program) -> str:
    """Return the SHA-256 of everything in a program but its weights."""
    return hashlib.sha256(dumps(to_json(program))).hexdigest()


def inputs_hash(sets: Iterable[Sequence[Tensor]]) -> str:
    """Return the SHA-256 of input sets."""
    digest = hashlib.sha256()
    for flat in sets:
        digest.update(f"{len(flat)};".encode())
        for tensor in flat:
            digest.update(tensor_hash(tensor).encode())
    return digest.hexdigest()


def data_hash(data: Any) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(dumps(data)).hexdigest()
