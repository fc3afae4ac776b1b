"""Check a whole recipe before touching a weight.

Passes speak of facts of the graph, never of each other: one requires a fact, another ends or
establishes it. What follows for their order, and the words for it, are found here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..ir.errors import OptionError
from ..ir.facts import Fact, objection
from ..ir.program import Program
from ..passes import PASSES
from ..passes.base import Pass

AnyPass = Pass[Any, Any]


def check_recipe(passes: Sequence[AnyPass], program: Program | None = None) -> None:
    """Refuse a recipe in which a pass needs a fact that does not hold when its turn comes.

    Args:
        passes: Passes in order.
        program: Where they start; None to look at the recipe alone.

    Raises:
        OptionError: Names both passes and what the fact is about, and the order that works.
    """
    ended: dict[Fact, AnyPass] = {}
    established: set[Fact] = set()
    for index, pass_ in enumerate(passes):
        for fact in sorted(pass_.requires):
            if fact in ended:
                raise OptionError(
                    f"{clash(ended[fact], pass_, fact)}; put it after {pass_.name}.",
                    remedy='change the order, or have it solved with order="auto".',
                )
            if program is not None and fact not in established and not pass_.allow_no_match:
                _check_start(program, pass_, fact, passes[index + 1 :])
        established = (established | pass_.establishes()) - pass_.ends()
        ended = {fact: by for fact, by in ended.items() if fact not in established}
        ended.update(dict.fromkeys(pass_.ends(), pass_))


def clash(ender: AnyPass, needer: AnyPass, fact: Fact) -> str:
    """Say why one pass cannot go before another: `a packs the weights that b must split`."""
    ends, needs = ender.verbs.get(fact, fact.ended), needer.verbs.get(fact, fact.needed)
    return f"{ender.name} {ends} {fact.thing} that {needer.name} {needs}"


def _check_start(program: Program, pass_: AnyPass, fact: Fact, later: Sequence[AnyPass]) -> None:
    found = objection(program, fact)
    if found is None:
        return
    makers = [other.name for other in later if fact in other.establishes()] or _makers(fact)
    what, where = found
    raise OptionError(
        f"{pass_.name} needs that {fact}, and {what}.",
        where=where,
        remedy=f"put {' or '.join(makers)} before {pass_.name}."
        if makers
        else f"leave {pass_.name} out, or start from a model of which that is true.",
    )


def _makers(fact: Fact) -> list[str]:
    """Name the registered passes that establish a fact by default."""
    return [
        kind.name
        for kind in PASSES
        if all(_has_default(f) for f in dataclasses.fields(kind)) and fact in kind().establishes()
    ]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing
