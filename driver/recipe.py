"""Recipes: which passes, in which order, with which options.

    fuse-projections, quantize-weights{bits=4, exclude=["*head*"]}

    [[pass]]
    name = "fuse-projections"

    [[pass]]
    name = "quantize-weights"
    bits = 4
    exclude = ["*head*"]

Python, text and TOML say the same; each turns into the others and back without loss.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from ..ir.errors import OptionError
from ..ir.plain import fit, plain
from ..passes import Pass
from .options import Option, options_of, schema
from .order import Order, ordered
from .recipe_text import read_calls, write
from .register import AnyPass, build_pass, find_pass, pass_names

Recipe = AnyPass | str | Path | Sequence[AnyPass | str | Path] | None


def resolve(passes: Recipe) -> list[AnyPass]:
    """Return the passes of a recipe in any form.

    Args:
        passes: A pass, recipe text, the path of a TOML recipe (ends in `.toml`), or a sequence that
            mixes them.

    Raises:
        OptionError: Something in it is not valid; the message says what, where and what is.
    """
    if passes is None:
        return []
    if isinstance(passes, Pass):
        return [passes]
    if isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith(".toml")):
        return read_toml(Path(passes))
    if isinstance(passes, str):
        return parse_text(passes)
    if isinstance(passes, Sequence):
        return [step for item in passes for step in resolve(item)]
    given = f"the class {passes.__name__}" if isinstance(passes, type) else f"{passes!r}"
    raise OptionError(
        f"{given} is not a pass.", remedy="give a Pass object, recipe text or a .toml file."
    )


def parse_text(text: str) -> list[AnyPass]:
    """Return the passes of a one-line recipe; see `recipe_text` for the grammar.

    Raises:
        OptionError: The text is malformed, or names what is not there.
    """
    return [
        build_pass(call.name, call.options, call.places.__getitem__) for call in read_calls(text)
    ]


def to_text(passes: Iterable[AnyPass]) -> str:
    """Return a one-line recipe; options at their default are left out."""
    return ", ".join(_call_text(step) for step in passes)


def read_toml(path: Path) -> list[AnyPass]:
    """Return the passes of a TOML recipe on disk.

    Raises:
        OptionError: The file cannot be read, or is not a valid recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the recipe {path}: {error}.") from error
    return parse_toml(text, source=str(path))


def parse_toml(text: str, *, source: str = "the recipe") -> list[AnyPass]:
    """Return the passes of a TOML recipe.

    Args:
        text: Content, a `[[pass]]` table per pass. `"none"` stands for None where that is allowed.
            `order = "auto"` above them solves their order.
        source: What messages call it.

    Raises:
        OptionError: The text is malformed, or names what is not there.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"not valid TOML: {error}.", where=source) from error
    unknown = sorted(data.keys() - {"pass", "order"})
    if unknown:
        raise OptionError(
            f"a recipe has no key {unknown[0]!r}.", where=source, remedy="use [[pass]] tables."
        )
    tables = data.get("pass", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise OptionError("pass is no list of tables.", where=source, remedy="write [[pass]].")
    passes = [
        _from_table(table, f"pass {index} of {source}") for index, table in enumerate(tables, 1)
    ]
    return ordered(passes, data.get("order", "given"))


def to_toml(passes: Iterable[AnyPass]) -> str:
    """Return a TOML recipe; options at their default are left out.

    Raises:
        OptionError: An option that may be None holds the string `none`, which TOML cannot tell.
    """
    tables = []
    for step in passes:
        options = {name: _without_none(value) for name, value in _options(step).items()}
        if _from_table({"name": step.name, **options}, step.name) != step:
            raise OptionError(f"{step.name}: TOML cannot tell the string 'none' from no value.")
        lines = [f"{name} = {write(value)}" for name, value in options.items()]
        tables.append("\n".join(["[[pass]]", f"name = {write(step.name)}", *lines]) + "\n")
    return "\n".join(tables)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of the TOML form, for editors and other writers."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockwright recipe",
        "type": "object",
        "properties": {
            "order": {"enum": list(get_args(Order)), "default": "given"},
            "pass": {"type": "array", "items": {"oneOf": list(map(_pass_schema, pass_names()))}},
        },
        "additionalProperties": False,
    }


def _call_text(step: AnyPass) -> str:
    options = ", ".join(f"{name}={write(value)}" for name, value in _options(step).items())
    return f"{step.name}{{{options}}}" if options else step.name


def _options(step: AnyPass) -> dict[str, Any]:
    return {name: plain(value) for name, value in step.options().items()}


def _from_table(table: dict[str, Any], where: str) -> AnyPass:
    name = table.get("name")
    if not isinstance(name, str):
        raise OptionError("a [[pass]] has no name.", where=where, remedy='add name = "...".')
    known = options_of(find_pass(name, where))
    values = {
        option: _with_none(value, known.get(option))
        for option, value in table.items()
        if option != "name"
    }
    return build_pass(name, values, lambda option: f"{option} in {where}" if option else where)


def _with_none(value: Any, option: Option | None) -> Any:
    """Read `"none"` as None where the option has a use for it."""
    replaced = _replace(value, "none", None)
    try:
        fit(replaced, option.hint if option else Any)
    except TypeError:
        return value
    return replaced


def _without_none(value: Any) -> Any:
    return _replace(value, None, "none")


def _replace(value: Any, old: object, new: object) -> Any:
    if isinstance(value, list):
        return [_replace(item, old, new) for item in value]
    return new if value == old and type(value) is type(old) else value


def _pass_schema(name: str) -> dict[str, Any]:
    kind = find_pass(name)
    options = options_of(kind)
    properties = {
        option.name: {"description": option.help, **schema(option.hint)}
        | ({} if option.required else {"default": _without_none(plain(option.default))})
        for option in options.values()
    }
    return {
        "type": "object",
        "title": name,
        "description": (kind.__doc__ or "").strip().partition("\n")[0],
        "properties": {"name": {"const": name}, **properties},
        "required": ["name", *(option.name for option in options.values() if option.required)],
        "additionalProperties": False,
    }
