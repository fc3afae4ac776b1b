"""What the compiler did, for people: text in a terminal, one page in a browser.

Both are drawn from the *record* of a compilation, plain JSON that an artefact keeps. Whatever a
record lacks is left out.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_COLUMNS = 100
_COUNTS = ("", " K", " M", " G", " T", " P")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COST = {
    "parameters": "parameters",
    "activated_parameters": "activated parameters",
    "weight_bytes": "bytes of weights",
    "flops": "FLOPs, a multiply-add is two",
    "bytes_moved": "bytes moved",
    "state_bytes": "bytes of state",
}


class Report:
    """The story of a compilation. Prints as text; a notebook shows the page.

    Attributes:
        record: Plain JSON: recipe, steps, cost, backend, notes.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def html(self) -> str:
        """Return a page that needs nothing beside itself."""
        return _template().render(
            record=self.record, steps=list(map(_step, _list(self.record, "steps"))),
            costs=list(_costs(self.record)), kinds=list(_kinds(self.record)),
            timings=_timings(self.record),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        page = html.escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=_COLUMNS, color_system=None).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        if record.get("model"):
            yield Text(str(record["model"]), style="bold")
        if record.get("recipe"):
            yield Text(str(record["recipe"]))
        if record.get("steps"):
            yield ""
            yield _steps_table(list(map(_step, record["steps"])))
        costs = list(_costs(record))
        if costs:
            yield ""
            yield _table(["cost", "before", "after", "change"], costs)
        timings = _timings(record)
        if timings:
            rows = [(t["name"] + (" (chosen)" if t["chosen"] else ""), t["text"]) for t in timings]
            yield ""
            yield _table(["backend", "time"], rows)
        for note in _list(record, "notes"):
            yield Text(f"note: {note}")


def count(value: Any) -> str:
    """Render a number, as in `22.7 M`."""
    return _scaled(value, 1000, _COUNTS)


def size(value: Any) -> str:
    """Render a number of bytes, as in `86.6 MiB`."""
    return _scaled(value, 1024, [f" {unit}" for unit in _BYTES])


def number(value: Any) -> str:
    """Render a measurement to three digits; a dash for none."""
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def change(before: Any, after: Any) -> str:
    """Render a change in percent, as in `−74.7 %`."""
    if not isinstance(before, int | float) or not isinstance(after, int | float) or not before:
        return ""
    percent = 100 * (after - before) / before
    sign = "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.1f} %" if abs(percent) >= 0.05 else "same"


def _scaled(value: Any, base: int, units: Sequence[str]) -> str:
    if not isinstance(value, int | float):
        return "–"
    scaled, unit = float(value), 0
    while abs(scaled) >= base and unit < len(units) - 1:
        scaled, unit = scaled / base, unit + 1
    digits = f"{scaled:.0f}" if unit == 0 or abs(scaled) >= 100 else f"{scaled:.1f}"
    return f"{digits}{units[unit]}"


def _step(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what page and table show of a pass."""
    receipt, plan = data.get("receipt") or {}, data.get("plan") or {}
    certificate = data.get("certificate") or {}
    skipped = receipt.get("skipped") or plan.get("skips") or {}
    outputs, blocks = certificate.get("outputs") or {}, certificate.get("blocks") or {}
    reasons: dict[str, list[str]] = {}
    for label, reason in skipped.items():
        reasons.setdefault(str(reason), []).append(label)
    largest = max([v for v in blocks.values() if isinstance(v, int | float)], default=0) or 1
    return {
        "name": data.get("pass", "a pass"),
        "options": data.get("options") or {},
        "promise": data.get("promise", ""),
        "seconds": data.get("seconds"),
        "verdict": certificate.get("verdict", ""),
        "changed": receipt.get("changed") or list(plan.get("decisions") or {}),
        "skipped": skipped,
        "reasons": reasons,
        "candidates": receipt.get("candidates"),
        "decisions": plan.get("decisions") or {},
        "sizes": [
            (name, show(pair[0]), show(pair[1]), change(*pair))
            for name, show in (("parameters", count), ("bytes", size), ("nodes", count))
            if len(pair := receipt.get(name) or []) == 2
        ],
        "outputs": outputs,
        "blocks": [(n, number(v), 100 * (v or 0) / largest) for n, v in blocks.items()],
        "bound": certificate.get("bound"),
        "difference": max([o.get("difference") or 0 for o in outputs.values()], default=None),
    }


def _costs(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    before, after = _cost(record, "before"), _cost(record, "after")
    for key, label in _COST.items():
        if key in before or key in after:
            show = size if "bytes" in key else count
            old, new = before.get(key), after.get(key)
            yield label, show(old), show(new), change(old, new)


def _kinds(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    before = _cost(record, "before").get("by_kind") or {}
    after = _cost(record, "after").get("by_kind") or {}
    for kind in dict.fromkeys((*before, *after)):
        old, new = before.get(kind, 0), after.get(kind, 0)
        yield kind, count(old), count(new), change(old, new)


def _timings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    backend = record.get("backend") or {}
    measured = backend.get("measured_ms") or {}
    known = {name: ms for name, ms in measured.items() if isinstance(ms, int | float)}
    slowest = max(known.values(), default=0) or 1
    return [
        {
            "name": name,
            "text": f"{number(known[name])} ms" if name in known else str(ms),
            "width": 100 * known.get(name, 0) / slowest,
            "chosen": name == backend.get("chosen"),
        }
        for name, ms in measured.items()
    ]


def _steps_table(steps: list[dict[str, Any]]) -> Table:
    rows = [
        (
            step["name"],
            str(len(step["changed"])),
            str(len(step["skipped"])),
            _before_after(step, "parameters"),
            _before_after(step, "bytes"),
            number(step["difference"]),
            step["verdict"] or step["promise"],
        )
        for step in steps
    ]
    return _table(["pass", "changed", "skipped", "parameters", "bytes", "error", "verdict"], rows)


def _before_after(step: Mapping[str, Any], what: str) -> str:
    """Render a size before and after a pass, once if it stayed the same."""
    for name, before, after, _ in step["sizes"]:
        if name == what:
            return str(before) if before == after else f"{before} → {after}"
    return ""


def _table(columns: list[str], rows: Any) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _cost(record: Mapping[str, Any], when: str) -> Mapping[str, Any]:
    return (record.get("cost") or {}).get(when) or {}


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    return list(record.get(key) or [])


@cache
def _template() -> jinja2.Template:
    source = resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number)
    return environment.from_string(source)
