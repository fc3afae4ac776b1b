"""Backends by name: ours, imported when asked for, and those that other packages bring.

A package adds one with an entry point of the group `blockwright.backends`: the name users give, and
the class, a `Backend`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..ir.errors import LoweringError, OptionError
from .base import Backend

GROUP = "blockwright.backends"
OURS: Mapping[str, tuple[str, str]] = {
    "eager": (".eager", "EagerBackend"),
    "inductor": (".inductor", "InductorBackend"),
    "onnxruntime": (".onnxruntime", "OnnxRuntimeBackend"),
}


def backend_names() -> list[str]:
    """Return the names of all known backends, installed or not."""
    return sorted({*OURS, *_plugins()})


def get_backend(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        OptionError: There is none; the message lists those there are.
        LoweringError: Its package does not import.
    """
    try:
        factory = _ours(name) if name in OURS else _brought(name)
    except (ImportError, AttributeError) as error:
        raise LoweringError(f"the backend {name} does not import: {error}.") from error
    backend = factory()
    assert isinstance(backend, Backend)
    return backend


def _ours(name: str) -> Any:
    module, qualname = OURS[name]
    return getattr(importlib.import_module(module, __package__), qualname)


def _brought(name: str) -> Any:
    plugins = _plugins()
    if name not in plugins:
        known = ", ".join(backend_names())
        raise OptionError(f"there is no backend {name!r}.", remedy=f"use one of {known}.")
    return plugins[name].load()


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
