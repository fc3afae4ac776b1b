"""Check a whole recipe before touching a weight.

Passes speak of facts of the graph, never of each other: one requires a fact, another ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.errors import OptionError
from ..passes.base import Pass


def check_recipe(passes: Sequence[Pass[Any, Any]]) -> None:
    """Refuse a recipe in which a pass needs a fact that an earlier one ends.

    Raises:
        OptionError: Names both passes and the fact, and the order that works.
    """
    ended: dict[str, str] = {}
    for pass_ in passes:
        for fact in sorted(pass_.requires & ended.keys()):
            raise OptionError(
                f"{pass_.name} needs that {fact}, which {ended[fact]} before it ends.",
                remedy=f"put {pass_.name} before {ended[fact]}.",
            )
        ended.update(dict.fromkeys(pass_.ends(), pass_.name))
