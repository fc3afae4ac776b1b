"""The page of a pass in `docs/passes`, made from docstrings, options, facts and golden graph."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from .cli_tables import pass_data
from .recipe import resolve, to_text, to_toml
from .recipe_text import write
from .register import AnyPass
from .templating import render


def pass_page(kind: type[AnyPass], golden: str) -> str:
    """Return the page of a pass, in Markdown.

    Args:
        kind: The pass.
        golden: Its golden graph, the first line of which is `# recipe: receipt`.
    """
    head, _, graph = golden.partition("\n")
    recipe, _, receipt = head.removeprefix("# ").partition(": ")
    (example,) = resolve(recipe)
    data = pass_data(kind)
    return render(
        "pass_page.md",
        data=data,
        class_name=kind.__name__,
        story=inspect.cleandoc(sys.modules[kind.__module__].__doc__ or ""),
        regions=[region.kind.replace("_", " ") for region in kind.region_kinds()],
        facts=_facts(example),
        options=[option | {"shown": _default(option)} for option in data["options"]],
        python=_python(example),
        text=to_text([example]),
        toml=to_toml([example]).strip(),
        receipt=receipt,
        graph=graph.strip(),
    )


def _facts(example: AnyPass) -> dict[str, list[str]]:
    found = {
        "requires": example.requires,
        "ends": example.ends(),
        "establishes": example.establishes(),
    }
    return {verb: sorted(facts) for verb, facts in found.items() if facts}


def _default(option: dict[str, Any]) -> str:
    return "(required)" if option["required"] else f"`{write(option['default'])}`"


def _python(example: AnyPass) -> str:
    """Return the call that makes a pass."""
    options = ", ".join(f"{name}={getattr(example, name)!r}" for name in example.options())
    return f"bw.{type(example).__name__}({options})"
