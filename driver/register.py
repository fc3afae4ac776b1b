"""Passes by name: our own and those other packages install.

A package adds passes by entry points of the group `blockwright.passes`, name to class. They are
imported when somebody asks for them by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..ir.errors import OptionError
from ..ir.plain import fit
from ..passes import PASSES, Pass
from .options import Option, describe, options_of

GROUP = "blockwright.passes"
AnyPass = Pass[Any, Any]


def pass_names() -> list[str]:
    """Name every pass that can be asked for, without importing plug-ins."""
    return sorted({*_own(), *_plugins()})


def find_pass(name: str, where: str | None = None) -> type[AnyPass]:
    """Return the class of a pass.

    Args:
        name: As in a recipe.
        where: Place of the name, for the message.

    Raises:
        OptionError: No pass is called that, or its plug-in does not load.
    """
    kind = _own().get(name)
    if kind is not None:
        return kind
    plugin = _plugins().get(name)
    if plugin is None:
        raise OptionError(
            f"there is no pass {name!r}.", where=where, remedy=_suggest(name, pass_names())
        )
    try:
        loaded = plugin.load()
    except Exception as error:
        raise OptionError(
            f"pass {name!r} of {plugin.value} does not load: {type(error).__name__}: {error}",
            where=where,
            remedy="reinstall or remove the package that brings it.",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise OptionError(f"entry point {name!r} ({plugin.value}) is not a Pass.", where=where)
    return loaded


def build_pass(
    name: str,
    values: Mapping[str, Any],
    locate: Callable[[str | None], str] = lambda option: "the recipe",
) -> AnyPass:
    """Make a pass from plain values.

    Args:
        name: Name of the pass.
        values: Options.
        locate: Says where the pass (None) or one of its options stands.

    Raises:
        OptionError: The pass or an option is unknown, missing, of another type or out of range.
    """
    kind = find_pass(name, locate(None))
    options = options_of(kind)
    missing = [o.name for o in options.values() if o.required and o.name not in values]
    if missing:
        wants = describe(options[missing[0]].hint)
        raise OptionError(
            f"{name} needs the option {missing[0]!r}.",
            where=locate(None),
            remedy=f"give {name}{{{missing[0]}=...}}, {wants}.",
        )
    fitted = {option: _fit(name, options, option, values[option], locate) for option in values}
    try:
        return kind(**fitted)
    except OptionError as error:
        where = error.where or locate(None)
        raise OptionError(error.what, where=where, remedy=error.remedy) from error


def _fit(
    name: str,
    options: Mapping[str, Option],
    option: str,
    value: Any,
    locate: Callable[[str | None], str],
) -> Any:
    if option not in options:
        raise OptionError(
            f"{name} has no option {option!r}.",
            where=locate(option),
            remedy=_suggest(option, options),
        )
    hint = options[option].hint
    try:
        return fit(value, hint)
    except TypeError:
        raise OptionError(
            f"{name}: {option} is {describe(hint)}, not {_shown(value)}.",
            where=locate(option),
        ) from None


def _suggest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"use one of {', '.join(names)}."


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"the string {value!r}" if isinstance(value, str) else repr(value)


def _own() -> dict[str, type[AnyPass]]:
    return {kind.name: kind for kind in PASSES}


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
