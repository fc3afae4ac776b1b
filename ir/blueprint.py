"""How a module is built, apart from the values of its weights.

Modules with equal blueprints compute the same function of their weights: their types agree, and so
do the shapes and ties of their weights and what their attributes hold, all the way down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .contents import ATOMS, Opaque, contents

_OWN = frozenset(vars(nn.Module()))  # attributes of every module; the rest are a class's options
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Number(NamedTuple):
    """An integer attribute, kept aside because blocks that are equal otherwise may be numbered.

    Attributes:
        module: Position of its module in `walk`.
        attribute: Its name.
        value: What it holds.
    """

    module: int
    attribute: str
    value: int


class Survey(NamedTuple):
    """How one module is built, integers apart.

    Attributes:
        key: Equal for equal modules; says of integer attributes only that they are there.
        numbers: Those integers.
        mutable: Objects behind attributes, which code could change in place.
        plain: Whether every attribute is data that can be read and nothing is hooked.
    """

    key: tuple[object, ...]
    numbers: tuple[Number, ...]
    mutable: tuple[Any, ...]
    plain: bool


def blueprint(module: nn.Module) -> tuple[dict[str, Tensor], object]:
    """Return a module's tensors by name, and how it is built without their values.

    An attribute that cannot be read agrees only with itself.
    """
    tensors = {
        f"{path}.{name}" if path else name: tensor
        for path, child in module.named_modules()
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None
    }
    found = survey(module)
    return tensors, (found.key, found.numbers)


def survey(module: nn.Module, seen: dict[int, object] | None = None) -> Survey:
    """Return how a module is built, integers apart.

    Args:
        module: What to look at.
        seen: What `contents` has read; share it among modules to read each object once.
    """
    seen = {} if seen is None else seen
    places, ties = walk(module), dict[int, int]()
    parts: list[object] = []
    numbers: list[Number] = []
    mutable: dict[int, Any] = {}
    plain = True
    for place, child in enumerate(places):
        held = child.__dict__
        parts += (type(child), child.training)
        parts += [(name, places.get(c)) for name, c in child._modules.items()]  # type: ignore[arg-type]
        plain = plain and not any(held[hooks] for hooks in _HOOKS)
        for name in held if len(held) > len(_OWN) else ():
            if name in _OWN:
                continue
            value = held[name]
            if type(value) is int:
                numbers.append(Number(place, name, value))
                parts.append(name)
                continue
            read = contents(value, seen)
            parts.append((name, read))
            if type(value) not in ATOMS:
                mutable[id(value)] = value
                plain = plain and not Opaque.within(read)
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                tied = ties.setdefault(id(tensor), len(ties))
                parts.append((name, tensor.shape, tensor.dtype, tied))
    return Survey(tuple(parts), tuple(numbers), tuple(mutable.values()), plain)


def walk(module: nn.Module) -> dict[nn.Module, int]:
    """Return a module and all below it, each once, numbered in the order of `modules()`."""
    found: dict[nn.Module, int] = {}
    stack = [module]
    while stack:
        current = stack.pop()
        if current not in found:
            found[current] = len(found)
            stack += [c for c in reversed(current._modules.values()) if c is not None]
    return found


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer by every name, as `state_dict` spells it."""
    stack = [("", module)]
    while stack:
        path, current = stack.pop()
        for table in (current._parameters, current._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield path + name, tensor
        below = [(f"{path}{name}.", c) for name, c in current._modules.items() if c is not None]
        stack += reversed(below)
