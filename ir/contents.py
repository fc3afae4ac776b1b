"""What an attribute holds, as something hashable that is equal for equal contents."""

from __future__ import annotations

import enum
import functools
import types
from typing import Any, NamedTuple

import torch

ATOMS = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type(...), torch.Size, torch.dtype,
        torch.device, torch.layout, torch.memory_format, types.CodeType, types.ModuleType,
    }
)  # fmt: skip
_LARGEST = 10_000  # values behind attributes beyond which the rest counts as unreadable


class Opaque(NamedTuple):
    """A value that cannot be read, and is equal to itself only."""

    kind: type
    identity: int

    @classmethod
    def within(cls, read: object) -> bool:
        """Whether `contents` met something it could not read."""
        return isinstance(read, cls) or (type(read) is tuple and any(map(cls.within, read)))


def contents(value: Any, seen: dict[int, object]) -> object:
    """Return what a value holds, all the way down.

    Plain data, functions with what they close over, and objects of classes written in Python that
    leave copying to Python are read. Tensors, modules and the rest are `Opaque`.

    Args:
        value: What to read.
        seen: What was read before, by identity; filled here. Its objects must stay alive.
    """
    kind = type(value)
    if kind in ATOMS:
        return (kind, value)
    known = seen.get(id(value))
    if known is None:
        seen[id(value)] = (kind, len(seen))  # what a cycle sees
        parts = _parts(value) if len(seen) < _LARGEST else None
        if parts is None:
            known = Opaque(kind, id(value))
        else:
            fixed, open_ = parts
            known = (kind, *fixed, *[contents(part, seen) for part in open_])
        seen[id(value)] = known
    return known


def _parts(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Return what is compared as it is and what is read further; None for what hides its state."""
    match value:
        case type() | enum.Enum() | torch._ops.OpOverload() | torch._ops.OpOverloadPacket():
            return (value,), ()
        case types.FunctionType():
            cells = tuple(_cell(cell) for cell in value.__closure__ or ())
            keywords = value.__kwdefaults__ or {}
            named = (*keywords.values(), *(value.__defaults__ or ()), *cells)
            return (value.__code__, *keywords), named
        case types.MethodType():
            return (), (value.__func__, value.__self__)
        case types.BuiltinFunctionType():
            held = value.__self__
            return (value.__qualname__,), (() if isinstance(held, types.ModuleType) else (held,))
        case functools.partial():
            return tuple(value.keywords), (value.func, *value.args, *value.keywords.values())
    own = _attributes(value)
    if own is None:
        return None
    if isinstance(value, dict):
        return (len(value), *own), (*value.keys(), *value.values(), *own.values())
    if isinstance(value, tuple | list):
        return (len(value), *own), (*value, *own.values())
    if isinstance(value, set | frozenset):
        return (frozenset(value), *own), tuple(own.values())
    if isinstance(value, int | float | complex | str | bytes):  # a subclass of one
        return (object.__reduce_ex__(value, 2)[1], *own), tuple(own.values())
    return tuple(own), tuple(own.values())


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of a value; None if its class keeps state elsewhere."""
    kind = type(value)
    if kind in (dict, tuple, list, set, frozenset):
        return {}
    copying = ("__reduce__", "__reduce_ex__", "__getstate__")
    if any(getattr(kind, name) is not getattr(object, name) for name in copying):
        return None
    try:
        state = object.__reduce_ex__(value, 2)[2]
    except TypeError:  # holds something in C that Python does not see
        return None
    own, slots = state if isinstance(state, tuple) else (state, None)
    return {**(own or {}), **(slots or {})}


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
