"""Arguments of graph nodes as plain JSON and back.

None, booleans, integers, finite floats, strings and lists stand for themselves. Everything else is
an object with one key that says what it is: `{"node": "linear_3"}`, `{"tuple": [1, 2]}`,
`{"float": "inf"}`, `{"dtype": "float32"}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import ArtefactError

_SINGLETONS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(value: Any) -> Any:
    """Return an argument as plain JSON.

    Raises:
        ArtefactError: It holds something that has no form as data.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, encode(item)] for key, item in value.items()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _SINGLETONS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise ArtefactError(
        f"a {type(value).__name__} ({value}) cannot be saved as an argument.",
        remedy="use numbers, strings, tuples, lists, dtypes and devices.",
    )


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """Return the argument `encode` wrote.

    Args:
        data: Plain JSON.
        nodes: Nodes that may be referred to, by name.

    Raises:
        ArtefactError: It is not something `encode` writes.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "node" and nodes is not None and content in nodes:
            return nodes[content]
        if kind in ("tuple", "slice"):
            items = [decode(item, nodes) for item in content]
            return tuple(items) if kind == "tuple" else slice(*items)
        if kind == "dict":
            return {str(key): decode(item, nodes) for key, item in content}
        if kind in _READERS and isinstance(content, str):
            return _READERS[kind](content)
    raise ArtefactError(f"the graph has an argument that cannot be read: {str(data)[:80]}.")


def dtype_from(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        ArtefactError: There is none.
    """
    found: torch.dtype = _singleton("dtype")(name)
    return found


def device_from(text: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ArtefactError: It names none.
    """
    if not re.fullmatch(r"[a-z]{2,16}(:\d{1,3})?", text, re.ASCII):
        raise ArtefactError(f"{text[:80]!r} is not a device.")
    return torch.device(text)


def _float(text: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ArtefactError(f"the graph has an argument that cannot be read: float {text[:80]!r}.")
    return float(text)


def _singleton(kind: str) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        found = vars(torch).get(name)
        if not isinstance(found, _SINGLETONS[kind]):
            raise ArtefactError(f"{name[:80]!r} is not a {kind} of this version of torch.")
        return found

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    "float": _float,
    "device": device_from,
    **{kind: _singleton(kind) for kind in _SINGLETONS},
}
