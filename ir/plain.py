"""Plain data (true, numbers, strings, None, lists and tables of them) and the types behind it.

Decisions, receipts and certificates are dataclasses in Python and plain data in a file. `plain`
goes one way; `fit` goes back, given the type, and takes nothing that does not fit.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_TABLES = (dict, Mapping)


def plain(value: Any) -> Any:
    """Return a value as plain data; what has no plain form is returned as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def fit(value: Any, hint: Any) -> Any:
    """Return plain data as the type a hint asks for.

    Raises:
        TypeError: It does not fit.
    """
    if hint is Any:
        return value
    if is_union(hint):
        return _fit_first(value, typing.get_args(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _fit_choice(value, {choice: choice for choice in args})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _fit_choice(value, {member.value: member for member in hint})
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _fit_dataclass(value, hint)
    if origin in _TABLES and isinstance(value, Mapping):
        return {fit(key, args[0]): fit(item, args[1]) for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if origin is list or Ellipsis in args else list(args)
        if len(kinds) == len(value):
            return origin(fit(item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if (hint in SCALARS and type(value) is hint) or (hint is type(None) and value is None):
        return value
    raise TypeError(f"{value!r} is not {hint}")


def is_union(hint: Any) -> bool:
    """Whether a type is one of several."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fit_dataclass(value: Any, hint: type) -> Any:
    fields = {f.name: f for f in dataclasses.fields(hint) if f.init}
    if not isinstance(value, Mapping) or not value.keys() <= fields.keys():
        raise TypeError(f"{value!r} is not {hint.__name__}")
    hints = typing.get_type_hints(hint)
    return hint(**{name: fit(item, hints[name]) for name, item in value.items()})


def _fit_first(value: Any, members: tuple[Any, ...]) -> Any:
    """Fit the member of the value's own type, else the first that takes it."""
    for member in sorted(members, key=lambda member: member is not type(value)):
        try:
            return fit(value, member)
        except TypeError:
            continue
    raise TypeError(f"{value!r} is none of {members}")


def _fit_choice(value: Any, choices: Mapping[Any, Any]) -> Any:
    for choice, result in choices.items():
        if type(choice) is type(value) and choice == value:
            return result
    raise TypeError(f"{value!r} is none of {list(choices)}")
