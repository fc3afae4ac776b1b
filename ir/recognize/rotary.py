"""Rotary position embeddings, however they are spelled.

Pairs of a head's numbers are turned by angles that grow with the position:

    (a, b)  ->  (a cos - b sin, b cos + a sin)

    half           a and b are i and i + dims / 2            Llama, GPT-NeoX
    interleaved    a and b are 2 i and 2 i + 1               GPT-J, FLUX; complex products

Whether spelled as sums of parts that are put together again, as `x * cos + turned(x) * sin`, or as
a product of complex numbers: what shows is which features of the projection meet in a sum.

Source: Su et al., 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .features import Features, sizes


@dataclass(frozen=True)
class Rotary:
    """How queries or keys are rotated by their positions. False unless they are.

    Attributes:
        kind: `none`; `rotary`; `unknown` when parts are mixed in another way, or with values that
            may come from the same source.
        pairing: `half` or `interleaved`; None without rotation.
        dims: Numbers of a head that are rotated, the first ones; the others stay as they are.
        tables: What they are multiplied by: cosines and sines, or one complex table.
    """

    kind: str = "none"
    pairing: str | None = None
    dims: int | None = None
    tables: tuple[fx.Node, ...] = ()

    def __bool__(self) -> bool:
        return self.kind == "rotary"

    def to_json(self) -> dict[str, Any]:
        """Return plain data, tables left out."""
        return {"kind": self.kind, "pairing": self.pairing, "dims": self.dims}


@dataclass(frozen=True)
class Mix:
    """What was done to the order and signs of a value's features.

    Attributes:
        negative: Whether it is negated, or a difference.
        swap: How its parts changed places or met in a sum: half of a rotation.
        turn: The rotation it went through.
    """

    negative: bool = False
    swap: Rotary | None = None
    turn: Rotary | None = None


UNMIXED = Mix()
Foreign = tuple[fx.Node, ...]
Part = tuple[Features | None, Mix, Foreign]


def negated(mix: Mix) -> Mix:
    """Return the mix of a value with its sign changed."""
    return replace(mix, negative=not mix.negative)


def summed(one: Part, other: Part, *, minus: bool) -> Mix:
    """Return the mix of a sum or difference of parts of one value."""
    (features, mix, foreign), (others, further, factors) = one, other
    tables = _apart(foreign, factors)
    swap = mix.swap if further.swap is None else further.swap
    if swap is not None and mix.swap != further.swap and foreign and factors and len(tables) > 1:
        return Mix(turn=replace(swap, kind="rotary", tables=tables))
    pairing = _pairing(features, others)
    if pairing is not None and foreign and factors:
        negative = (mix.negative != further.negative) != minus
        return Mix(negative=negative, swap=replace(pairing, tables=tables))
    return Mix(turn=mix.turn or further.turn)


def put_together(parts: Sequence[Part]) -> Mix:
    """Return the mix of parts of one value, side by side or stacked."""
    mixes = [mix for _, mix, _ in parts]
    turns = {mix.turn for mix in mixes if mix.turn}
    if len(turns) == 1:
        return Mix(turn=turns.pop())
    if len(parts) == 2 and mixes[0].negative != mixes[1].negative:
        one, other = mixes
        if one.swap is not None and other.swap is not None:
            tables = tuple(dict.fromkeys((*one.swap.tables, *other.swap.tables)))
            return Mix(turn=replace(one.swap, kind="rotary", tables=tables))
        return Mix(swap=_pairing(parts[0][0], parts[1][0]))
    return UNMIXED


def complex_product(node: fx.Node, table: fx.Node) -> Mix:
    """Return the mix of complex numbers times a complex table."""
    size = sizes(node)[-1]
    dims = 2 * size if isinstance(size, int) else None
    return Mix(turn=Rotary("rotary", "interleaved", dims, (table,)))


def _apart(one: Foreign, other: Foreign) -> Foreign:
    """Return the factors that only one of two parts was multiplied by."""
    common = set(one) & set(other)
    return tuple(node for node in dict.fromkeys((*one, *other)) if node not in common)


def _pairing(one: Features | None, other: Features | None) -> Rotary | None:
    """Say how two parts interlock, if they lie alike within each head."""
    if one is None or other is None or one.rows is None or other.rows is None:
        return None
    axes = [axis for axis in one.axes or () if axis]
    if one.axes != other.axes or not axes:
        return None
    distance = abs(one.rows.start - other.rows.start)
    size, stride = min(axes, key=lambda axis: axis[1])
    if stride == 2 * distance:
        return Rotary("unknown", "interleaved", 2 * size)
    return Rotary("unknown", "half", 2 * size) if distance == size * stride else None
