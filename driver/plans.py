"""Plans from outside: saved, edited, replayed.

A pass that is given a plan does not decide; it carries the plan out. The same plan on the same
program gives the same program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backends import container, plainjson
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import Pass, Plan

AnyPlan = Plan[Any]
Plans = Sequence[AnyPlan | Mapping[str, Any] | None] | str | Path


def read_plans(plans: Plans | None, passes: Sequence[Pass[Any, Any]]) -> list[AnyPlan | None]:
    """Return a plan per pass; None where the pass decides itself.

    Args:
        plans: One entry per pass: a plan, one as plain data, or None. Or the path of a plan.json,
            or of a saved engine that holds one: its passes must be these.
        passes: Passes in the order they run.

    Raises:
        OptionError: The plans are not those of these passes.
    """
    if plans is None:
        return [None] * len(passes)
    if isinstance(plans, str | Path):
        plans = _read_file(Path(plans), passes)
    if len(plans) != len(passes):
        raise OptionError(
            f"there are {len(plans)} plans for {len(passes)} passes.",
            remedy="give one entry per pass, None where the pass is to decide.",
        )
    return [
        plan if plan is None or isinstance(plan, Plan) else Plan.from_json(plan, type(pass_))
        for plan, pass_ in zip(plans, passes, strict=True)
    ]


def arranged(plan: AnyPlan, pass_: Pass[Any, Any], program: Program) -> AnyPlan:
    """Return a plan in execution order, in which a pass would have made it.

    Raises:
        OptionError: It decides for a region the program lacks; names the first.
    """
    known = {region.label: index for index, region in enumerate(pass_.regions(program))}
    for label in plan.decisions:
        if label not in known:
            raise OptionError(
                f"the plan for {pass_.name} decides about {label!r}, which is no place of the"
                " program where the pass looks.",
                remedy="take that entry out, or run the passes the plan was made after.",
            )
    decisions = sorted(plan.decisions.items(), key=lambda item: known[item[0]])
    skips = sorted(plan.skips.items(), key=lambda item: known.get(item[0], len(known)))
    return Plan(dict(decisions), dict(skips))


def require_carried_out(given: AnyPlan, done: AnyPlan, pass_: Pass[Any, Any]) -> None:
    """Refuse a plan of which a pass that works in rounds has left something out.

    Raises:
        OptionError: Names the first.
    """
    known = {**done.decisions, **done.skips}
    left = [label for label in given.decisions if label not in known]
    if left:
        raise OptionError(
            f"the plan for {pass_.name} decides about {len(given.decisions)} places, and {pass_}"
            f" carries out {len(done.decisions)} of them.",
            where=left[0],
            remedy="give the options the plan was made with.",
        )


def _read_file(path: Path, passes: Sequence[Pass[Any, Any]]) -> list[Mapping[str, Any] | None]:
    """Return the plans of a plan.json, or of the one in an artefact."""
    try:
        file = path
        if path.is_dir():
            _, entries = container.read(path)
            file = path / entries["plan.json"].file
        steps = plainjson.read(file)["steps"]
        found = [(str(step["pass"]), step.get("plan")) for step in steps]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} holds no plan: {type(error).__name__} {error}.",
            remedy="give a plan.json, or the folder of a saved engine.",
        ) from error
    names = [pass_.name for pass_ in passes]
    if [name for name, _ in found] != names:
        raise OptionError(
            f"{path} plans {', '.join(name for name, _ in found) or 'nothing'}, and the recipe is"
            f" {', '.join(names) or 'empty'}.",
            remedy="give the recipe the plan was made by.",
        )
    return [plan for _, plan in found]
