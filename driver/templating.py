"""Text from the templates in `driver/templates`: Python, TOML and Markdown."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Return a template with its values filled in.

    Args:
        template: File name, without `.j2`.
        values: What the template names; all of it.
    """
    return _environment().get_template(f"{template}.j2").render(**values)


@cache
def _environment() -> jinja2.Environment:
    folder = resources.files(__package__ or "") / "templates"
    texts = {f.name: f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".j2")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(texts),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")  # of a table
    return environment
