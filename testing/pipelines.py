"""Random passes and sequences of them, with options drawn from what their dataclasses say."""

from __future__ import annotations

import dataclasses
import random
import re
from functools import cache
from typing import Any

from hypothesis import strategies as st

from ..driver.options import Option, options_of
from ..ir.errors import OptionError
from ..passes import PASSES
from .case import AnyPass

PATTERNS = (("*",), ("*.ffn.*",), ("*0*",))
Draw = Any


@st.composite
def passes(draw: Draw, kinds: tuple[type[AnyPass], ...] = PASSES) -> AnyPass:
    """Draw a pass; an option that does not go with those before it keeps its default."""
    kind = draw(st.sampled_from(kinds))
    chosen: dict[str, Any] = {**required(kind), "allow_no_match": True}
    for name, values in choices(kind).items():
        value = draw(st.none() | st.sampled_from(values).map(lambda v: (v,)))
        if value is not None and _accepts(kind, chosen | {name: value[0]}):
            chosen[name] = value[0]
    return kind(**chosen)


def random_pass(draw: random.Random) -> AnyPass:
    """Return a registered pass with random options, without the searching of hypothesis."""
    kind = draw.choice(PASSES)
    chosen: dict[str, Any] = required(kind)
    for name, values in choices(kind).items():
        value = draw.choice(values)
        if draw.random() < 0.5 and _accepts(kind, chosen | {name: value}):
            chosen[name] = value
    return kind(**chosen)


def pipelines(max_size: int = 3) -> st.SearchStrategy[list[AnyPass]]:
    """Draw sequences of passes, in orders that need not work."""
    return st.lists(passes(), max_size=max_size)


@cache
def choices(kind: type[AnyPass]) -> dict[str, list[Any]]:
    """Return values each option of a pass accepts on its own, by name."""
    found = {}
    for option in options_of(kind).values():
        values = [
            v for v in _candidates(option) if _accepts(kind, required(kind) | {option.name: v})
        ]
        if values and option.name != "allow_no_match":
            found[option.name] = values
    return found


def required(kind: type[AnyPass]) -> dict[str, Any]:
    """Return options that have no default, as the first of the class's examples has them."""
    names = [f.name for f in dataclasses.fields(kind) if _has_no_default(f)]
    return {name: kind.examples[0][name] for name in names}


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _candidates(option: Option) -> list[Any]:
    """Return values of an option's type; words are those its documentation puts in backticks."""
    if option.hint is bool:
        return [False, True]
    if option.hint in (int, int | None):
        return [0, 1, 2, 3, 4, 8, 64, 1 << 20]
    if option.hint in (float, float | None):
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    if option.hint in (str, str | None):
        return re.findall(r"`(\w+)`", option.help)
    return list(PATTERNS) if option.hint == tuple[str, ...] else []


def _accepts(kind: type[AnyPass], options: dict[str, Any]) -> bool:
    try:
        kind(**options)
    except OptionError:
        return False
    return True
