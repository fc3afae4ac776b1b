"""How a module is built, apart from the values of its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))  # attributes of every module; the rest are a class's options


def blueprint(module: nn.Module) -> tuple[dict[str, Tensor], object]:
    """Return a module's tensors by name, and how it is built without their values.

    Modules with equal blueprints compute the same function of their weights: their types agree,
    and so do shapes and ties of weights and all plain attributes. An attribute that is no plain
    data agrees only with itself.
    """
    tensors: dict[str, Tensor] = {}
    parts: list[object] = []
    seen: dict[int, int] = {}
    for path, child in module.named_modules():
        options: list[object] = [path, type(child), child.training]
        options += [
            (attribute, _plain(value))
            for attribute, value in child.__dict__.items()
            if attribute not in _OWN
        ]
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                tied = seen.setdefault(id(tensor), len(seen))
                tensors[f"{path}.{name}" if path else name] = tensor
                options.append((name, tensor.shape, tensor.dtype, tied))
        parts.append(tuple(options))
    return tensors, tuple(parts)


def is_plain(module: nn.Module) -> bool:
    """Whether all attributes of a module and its children are plain data."""
    return not any(
        _is_opaque(_plain(value))
        for child in module.modules()
        for attribute, value in child.__dict__.items()
        if attribute not in _OWN
    )


def _is_opaque(plain: object) -> bool:
    return isinstance(plain, _Opaque) or (isinstance(plain, tuple) and any(map(_is_opaque, plain)))


class _Opaque(NamedTuple):
    """An object that is equal to itself only."""

    kind: type
    identity: int


def _plain(value: Any) -> object:
    """Return something hashable that is equal for equal plain data."""
    if value is None or isinstance(value, int | float | str | bool | torch.dtype):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), *map(_plain, value))
    named = getattr(value, "__qualname__", "<")
    if callable(value) and "<" not in named and getattr(value, "__self__", None) is None:
        return (value.__module__, named)
    return _Opaque(type(value), id(value))
