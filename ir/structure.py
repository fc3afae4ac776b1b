"""The nesting of a value: which tuples, dicts and dataclasses its leaves sit in.

A `Structure` is plain data, so that an artefact can say how a model is called and what it returns
without naming code to run. Types of other libraries (a Hugging Face `ModelOutput`, a registered
dataclass) are kept by name: a loaded engine rebuilds them where their module is already imported
and otherwise returns an `Outputs`, which reads the same way.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch.utils import _pytree as pytree


class Outputs(dict[str, Any]):
    """Named outputs, read as `out["logits"]`, `out.logits` or `out[0]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass(frozen=True)
class Structure:
    """One level of nesting.

    Attributes:
        kind: `leaf`, `none`, `tuple`, `list`, `dict`, or `module:qualname` of a registered type.
        keys: Names of the children, for kinds that name them.
        children: Nested structures, in flattening order.
    """

    kind: str
    keys: tuple[str, ...] = ()
    children: tuple[Structure, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Self:
        """Return the structure of `value`."""
        return cls.from_spec(pytree.tree_structure(value))

    @classmethod
    def from_spec(cls, spec: pytree.TreeSpec) -> Self:
        """Return the structure a pytree spec describes."""
        if spec.is_leaf():
            return cls("leaf")
        kind = _KINDS.get(spec.type) or f"{spec.type.__module__}:{spec.type.__qualname__}"
        if _is_named_tuple(spec.type):
            kind = "tuple"  # named tuples come back as plain ones
        children = tuple(cls.from_spec(child) for child in spec.children())
        return cls(kind, tuple(map(str, _names(spec))), children)

    @property
    def leaves(self) -> int:
        """Count the leaves."""
        return 1 if self.kind == "leaf" else sum(child.leaves for child in self.children)

    def paths(self, prefix: str = "") -> list[str]:
        """Name every leaf by its way from the root, as in `past.0.key`."""
        if self.kind == "leaf":
            return [prefix]
        names = self.keys or tuple(map(str, range(len(self.children))))
        dot = f"{prefix}." if prefix else ""
        return [
            path
            for name, child in zip(names, self.children, strict=True)
            for path in child.paths(dot + name)
        ]

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return a value of this structure that holds `leaves`."""
        return self._build(iter(leaves))

    def _build(self, leaves: Any) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        values = [child._build(leaves) for child in self.children]
        if self.kind in _BUILDERS:
            return _BUILDERS[self.kind](self.keys, values)
        named = dict(zip(self.keys, values, strict=True))
        factory = _imported(self.kind)
        return factory(**named) if factory else Outputs(named)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads back."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.keys:
            data["keys"] = list(self.keys)
        if self.children:
            data["children"] = [child.to_json() for child in self.children]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        children = tuple(cls.from_json(child) for child in data.get("children", ()))
        return cls(str(data["kind"]), tuple(map(str, data.get("keys", ()))), children)


_KINDS: dict[Any, str] = {tuple: "tuple", list: "list", dict: "dict", type(None): "none"}
_BUILDERS: dict[str, Callable[[tuple[str, ...], list[Any]], Any]] = {
    "none": lambda keys, values: None,
    "tuple": lambda keys, values: tuple(values),
    "list": lambda keys, values: values,
    "dict": lambda keys, values: dict(zip(keys, values, strict=True)),
}


def _names(spec: pytree.TreeSpec) -> Sequence[Any]:
    """Return the child names a pytree context carries, or none for sequences."""
    if spec.type in (tuple, list, type(None)) or _is_named_tuple(spec.type):
        return ()
    context = spec.context
    if isinstance(context, list) and context and isinstance(context[0], list):
        context = context[0]  # torch's own dataclasses: [names, names of fields that are None]
    if isinstance(context, Sequence) and len(context) == spec.num_children:
        return context
    return [str(index) for index in range(spec.num_children)]


def _is_named_tuple(kind: Any) -> bool:
    """Whether a pytree type is `namedtuple`, or a tuple with names such as `torch.max` returns."""
    return kind is namedtuple or (isinstance(kind, type) and issubclass(kind, tuple))


def _imported(kind: str) -> Callable[..., Any] | None:
    """Find a registered pytree type by name; never import or call anything else for a file."""
    module, _, name = kind.partition(":")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and found in pytree.SUPPORTED_NODES else None
