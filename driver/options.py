"""Options of a pass: read from its dataclass, checked, described.

A recipe holds plain values (true, 3, 0.5, "text", none, lists of them). `ir.plain.fit` turns one
into what the field's type asks for; `describe` and `schema` say the same rules to people and to
editors.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, Literal

from ..ir.plain import SCALARS, is_union
from ..passes import Pass

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        name: Field of the dataclass.
        hint: Type of the field.
        default: Value when left out; `dataclasses.MISSING` when it must be given.
        help: What the docstring says about it.
    """

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is MISSING


def options_of(kind: type[Pass[Any, Any]]) -> dict[str, Option]:
    """Return the options of a pass by name, those every pass has last."""
    hints, helps = typing.get_type_hints(kind), attribute_help(kind)
    common = {field.name for field in dataclasses.fields(Pass)}
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name in common)
    return {
        f.name: Option(f.name, hints[f.name], _default(f), helps.get(f.name, ""))
        for f in fields
        if f.init
    }


def attribute_help(kind: type) -> dict[str, str]:
    """Return the `Attributes:` section of a class's docstring, base classes included."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
        pairs = zip(entries[::2], entries[1::2], strict=True)
        helps |= {name: " ".join(words.split()) for name, words in pairs}
    return helps


def describe(hint: Any) -> str:
    """Say in words what a type accepts, as in `a list of strings or none`."""
    if is_union(hint):
        return " or ".join(describe(member) for member in typing.get_args(hint))
    choices, items = _choices(hint), _items(hint)
    if choices is not None:
        return f"one of {', '.join(map(str, choices))}"
    if items is not None:
        return f"a list, each {describe(items)}"
    if typing.get_origin(hint) is tuple:
        return f"a list [{', '.join(map(describe, typing.get_args(hint)))}]"
    return "none" if hint is type(None) else SCALARS.get(hint, "a value only Python can give")


def schema(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type, `none` spelled as the string TOML has for it."""
    if is_union(hint):
        return {"anyOf": [schema(member) for member in typing.get_args(hint)]}
    choices, items = _choices(hint), _items(hint)
    if choices is not None:
        return {"enum": choices}
    if items is not None:
        return {"type": "array", "items": schema(items)}
    if typing.get_origin(hint) is tuple:
        kinds = [schema(kind) for kind in typing.get_args(hint)]
        return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}
    if hint is type(None):
        return {"const": "none"}
    return {"type": _JSON_TYPES[hint]} if hint in _JSON_TYPES else {}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _choices(hint: Any) -> list[Any] | None:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return [member.value for member in hint] if is_enum else None


def _items(hint: Any) -> Any | None:
    """Return the type of the items of a list of any length."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    return args[0] if origin is list or (origin is tuple and Ellipsis in args) else None
