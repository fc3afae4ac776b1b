"""Tensors in a safetensors file: written one at a time, read without copying.

    8 bytes: length n of the header | n bytes: JSON, name -> type, shape, offsets | the tensors

We write the format ourselves, because a backend needs to know where each tensor will lie, and the
hash of a file that is larger than memory is best taken while it passes by. Reading goes through
the library, after checks it leaves out: names given twice and bytes that belong to no tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ir.errors import ArtefactError
from .plainjson import loads

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_LARGEST_HEADER = 100_000_000


def layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header of a file, and first byte and length of each tensor in the file.

    Wide types come first, so that every tensor is aligned to its own type.

    Raises:
        ArtefactError: A tensor has no data or a type the format lacks.
    """
    entries: dict[str, Any] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.is_meta or tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ArtefactError(
                f"tensor {name!r} ({tensor.dtype}, on {tensor.device}) cannot be saved.",
                remedy="load its weights first, or convert it to a dense type of torch.",
            )
        end = position + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    spans = {
        name: (start + begin, end - begin)
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }
    return struct.pack("<Q", len(text)) + text, spans


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file, at most one tensor of them in memory at a time."""
    header, spans = layout(tensors)
    yield header
    for name in spans:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory rather than copied.

    Raises:
        ArtefactError: The file is not sound.
    """
    try:
        names = list(_checked_header(path))
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _checked_header(path: Path) -> dict[str, Any]:
    """Return the header after checking it against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, "the header is longer than the file")
        header = loads(file.read(length), path.name)
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a table")
    header.pop("__metadata__", None)
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, item)):
        begin, end = _offsets(path, (name, entry))
        if begin != position or end - begin != _bytes(entry):
            raise _damaged(path, f"the bytes of {name[:80]!r} are not where they belong")
        position = end
    if position != size - 8 - length:
        raise _damaged(path, "there are bytes that belong to no tensor")
    return header


def _offsets(path: Path, item: tuple[str, Any]) -> tuple[int, int]:
    name, entry = item
    entry = entry if isinstance(entry, dict) else {}
    offsets = entry.get("data_offsets")
    if not (_sizes(offsets) and len(offsets) == 2 and _sizes(entry.get("shape"))):
        raise _damaged(path, f"the entry of {name[:80]!r} is malformed")
    if entry.get("dtype") not in DTYPES:
        raise _damaged(path, f"{name[:80]!r} has an unknown type")
    begin, end = offsets
    return begin, end


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bytes(entry: Mapping[str, Any]) -> int:
    count: int = math.prod(entry["shape"])
    return count * DTYPES[entry["dtype"]].itemsize


def _damaged(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path.name} is not a sound safetensors file: {reason}.",
        where=str(path),
        remedy="the file is damaged; save or download the artefact again.",
    )
