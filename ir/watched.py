"""A number that tells whether anybody looked at it.

Blocks are often numbered: `layer_idx` is what Hugging Face decoders find their cache by. Blocks
that differ only in a number nobody looks at compute the same. Whether one is looked at shows when
the block runs with a `Watched` in the number's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Watched:
    """Stands for an integer; passing it on is no use, anything that depends on it is.

    It is no `int`, so that no C code can read it without asking here; to `isinstance` it is one.
    """

    __slots__ = ("_number", "_used")

    def __init__(self, number: int) -> None:
        self._number, self._used = number, False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __getattr__(self, name: str) -> Any:
        self._used = True
        return getattr(self._number, name)


def was_used(number: Watched) -> bool:
    """Whether anything depended on the number so far."""
    return bool(object.__getattribute__(number, "_used"))


def _recording(name: str) -> Callable[..., Any]:
    def use(self: Watched, *args: Any) -> Any:
        self._used = True
        plain = [a._number if type(a) is Watched else a for a in args]
        return getattr(self._number, name)(*plain)

    return use


_ITS_OWN = {*vars(Watched), *vars(object)} - {"__eq__", "__ne__", "__hash__", "__repr__", "__str__"}
_ITS_OWN -= {"__lt__", "__le__", "__gt__", "__ge__", "__format__", "__reduce__", "__reduce_ex__"}
for _name in dir(int):
    if _name.startswith("__") and _name not in _ITS_OWN:
        setattr(Watched, _name, _recording(_name))
