"""What the command line shows: tables for people, JSON for scripts, progress, one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..ir.errors import BlockwrightError

PIPED_COLUMNS = 120  # of output that goes to no terminal
PATIENCE_S = 2.0  # work that ends sooner shows no bar
ROWS = 14  # most rows of a table by path
Report = Callable[[str, int, int], None]


@contextlib.contextmanager
def screen(as_json: bool, debug: bool) -> Iterator[None]:
    """Turn expected errors into one line and an exit code: 2, or 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted.", err=True)
        raise typer.Exit(130) from None
    except BlockwrightError as error:
        if debug:
            traceback.print_exc()
        if as_json:
            show_json({"error": {"type": type(error).__name__, "what": error.what,
                                 "where": error.where, "remedy": error.remedy}})  # fmt: skip
        else:
            notes = getattr(error, "__notes__", [])
            typer.echo("\n".join([error.one_line(), *notes]), err=True)
        raise typer.Exit(2) from None


def show_json(data: Any) -> None:
    """Print data on stdout as JSON; NaN and infinity as null, which JSON lacks."""
    typer.echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str))


def show(*parts: RenderableType) -> None:
    """Print tables and text on stdout; brackets in text mean nothing."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(width=PIPED_COLUMNS if piped else None)
    for part in parts:
        whole_lines = isinstance(part, Text) and bool(part.no_wrap)
        console.print(part, markup=False, highlight=False, soft_wrap=whole_lines)


def titled(title: str, text: str) -> Text:
    """Return a paragraph after its title."""
    return Text.assemble((title, "bold"), " ", text)


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Yield a callback (stage, done, total) that drives a bar on stderr, for a terminal only."""
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=None)
    timer = threading.Timer(PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda stage, done, total: bar.update(
            task, description=escape(stage), completed=done, total=total
        )
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def table(title: str, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> RenderableType:
    """Return a table under a title; columns whose name begins with `#` are numbers."""
    names = [column.lstrip("#") for column in columns]
    made = Table(box=None, pad_edge=False, show_header=any(names))
    for index, (column, name) in enumerate(zip(columns, names, strict=True)):
        number = column.startswith("#")
        made.add_column(name, justify="right" if number else "left", no_wrap=number or index == 0)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return Group(Text(title, style="bold"), made)


def coloured_diff(text: str) -> Text:
    """Return a unified diff in colour, its lines never broken."""
    colours = {"+": "green", "-": "red", "@": "cyan"}
    lines = [Text(line, style=colours.get(line[:1], "")) for line in text.splitlines()]
    return Text("\n", no_wrap=True).join(lines)


def grouped(counts: Mapping[str, int], depth: int) -> Counter[str]:
    """Sum counts by module path, blocks numbered alike together, cut at a depth."""
    sums: Counter[str] = Counter()
    for path, count in counts.items():
        parts = ["*" if part.isdigit() else part for part in path.split(".")]
        sums[".".join(parts[:depth])] += count
    return sums


def depth_for(paths: Iterable[str], rows: int = ROWS) -> int:
    """Return the largest depth at which paths fall into at most so many groups."""
    counts = dict.fromkeys(paths, 1)
    deepest = max((path.count(".") + 1 for path in counts), default=1)
    fitting = [depth for depth in range(1, deepest + 1) if len(grouped(counts, depth)) <= rows]
    return max(fitting, default=1)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and data - data != 0:
        return None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    return list(map(_finite, data)) if isinstance(data, list | tuple) else data
