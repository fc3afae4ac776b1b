"""`blockwright diff`: two models or saved engines, in words, region by region, node by node."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from ..backends.report import change, count, size
from ..ir.errors import OptionError
from .cli_models import InputOptions, open_program
from .cli_options import Debug, DynamicSizes, Inputs, Json, Vocab
from .cli_view import coloured_diff, progress, screen, show, show_json, table
from .diff import Diff, diff
from .diff_words import part_text

LEVELS = ("summary", "regions", "nodes")


def diff_command(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A model or saved engine.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Another.")],
    level: Annotated[
        str,
        typer.Option(
            metavar="|".join(LEVELS),
            help="In words; every part of every block side by side; or the graphs as text.",
        ),
    ] = "summary",
    all_: Annotated[
        bool, typer.Option("--all", help="With regions: those that did not change as well.")
    ] = False,
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    vocab: Vocab = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how two models or saved engines differ.

    Exit code 0: the same graphs and weights; 1: they differ. --json has all three levels.
    """
    with screen(as_json, debug), progress() as report:
        if level not in LEVELS:
            raise OptionError(f"there is no level {level!r}.", remedy=f"use {', '.join(LEVELS)}.")
        given = InputOptions(input_ or (), dynamic or (), vocab)
        report("capture", 0, 2)
        before = open_program(old, given)
        report("capture", 1, 2)
        after = open_program(new, given)
        report("compare", 0, 1)
        found = diff(before, after, (old, new))
        equal = found.equal
    if as_json:
        show_json(found.to_json(all_=all_))
    else:
        show(*_view(found, level, all_))
    if not equal:
        raise typer.Exit(1)


def _view(found: Diff, level: str, all_: bool) -> list[RenderableType]:
    notes: list[RenderableType] = [f"note: {note}" for note in found.notes()]
    if level == "nodes":
        text = found.text()
        return [coloured_diff(text) if text else "the graphs are the same.", *notes]
    if level == "regions":
        return [_regions(found, all_), *notes]
    same = "the same graphs." if notes else "the same graphs and weights."
    lines = [*map(str, found.changes()), *found.signature()] or [same]
    costs = table("\nCost of one call", ("", "#old", "#new", "#change"), found.totals())
    return [*lines, costs, *notes]


def _regions(found: Diff, all_: bool) -> RenderableType:
    rows = []
    for row in found.rows(all_=all_):
        old, new = row.old, row.new
        one = new or old
        assert one is not None
        costs = [((old.size_bytes if old else 0), (new.size_bytes if new else 0), size),
                 ((old.flops if old else 0), (new.flops if new else 0), count)]  # fmt: skip
        moved = [show(b) if a == b else f"{show(b)} ({change(a, b) or 'new'})"
                 for a, b, show in costs]  # fmt: skip
        before, after = part_text(old), part_text(new)
        words = after if before == after else f"{before} -> {after}"
        rows.append((f"{row.block}.{one.path}".rstrip("."), one.role, words, *moved))
    title = "Parts" if all_ else "Parts that changed"
    return table(title, ("where", "part", "old -> new", "#bytes", "#FLOPs"), rows)
