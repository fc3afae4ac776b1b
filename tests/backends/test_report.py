"""The report shows what a record holds, and is content with little."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from blockwright.backends.report import Report, change, count, size

STEP = {
    "pass": "quantize-weights",
    "options": {"bits": 8},
    "promise": "bounded",
    "seconds": 0.1,
    "plan": {"decisions": {"layer.0": {"bits": 8}}, "skips": {}},
    "receipt": {
        "candidates": 3, "changed": ["layer.0"], "parameters": [72, 72], "bytes": [2880, 864],
        "skipped": {"layer.1": "has 3 outputs", "head": "has 3 outputs"},
    },
    "certificate": {
        "outputs": {"y": {"old": 2e-7, "new": 8e-3, "difference": 8.1e-3, "cosine": 0.9999}},
        "blocks": {"layer.0": 0.004, "layer.1": 0.008},
        "bound": {"checked": 28, "worst_ratio": 0.13},
        "verdict": "kept",
    },
}  # fmt: skip
RECORD: dict[str, Any] = {
    "recipe": "quantize-weights{bits=8}", "model": "tiny <b>", "notes": ["no cache & no mask"],
    "sizes": {"batch": 2}, "steps": [STEP],
    "cost": {
        "before": {"parameters": 22_700_000, "weight_bytes": 90_800_000, "by_kind": {"linear": 9}},
        "after": {"parameters": 22_700_000, "weight_bytes": 22_900_000, "by_kind": {"linear": 9}},
    },
    "backend": {"chosen": "onnxruntime", "measured_ms": {"eager": 12.0, "onnxruntime": 4.0}},
    "text": {"before": "def graph(x): ...", "after": "def graph(x): return x"},
}  # fmt: skip


class Balanced(HTMLParser):
    """Fails on tags that do not match; notes what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not parser.loads
    assert "http" not in page
    return page


def test_the_page_tells_the_story() -> None:
    page = checked(Report(RECORD).html())
    for text in (
        "tiny &lt;b&gt;", "no cache &amp; no mask", "86.6 MiB", "−74.8 %", "has 3 outputs",
        "layer.1, head", "0.0081", "0.999900", "0.13 of what it allows", "onnxruntime, chosen",
        "12 ms", "def graph(x): return x", "1 changed, 2 skipped of 3 candidates", "bits=8",
    ):  # fmt: skip
        assert text in page, text
    assert "prefers-color-scheme: dark" in page


def test_the_text_fits_a_terminal() -> None:
    lines = str(Report(RECORD)).splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("quantize-weights "))
    assert row.split()[:3] == ["quantize-weights", "1", "2"]
    assert row.endswith("kept")
    assert "onnxruntime (chosen)" in str(Report(RECORD))


def test_a_notebook_gets_a_frame_of_its_own() -> None:
    shown = Report(RECORD)._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<style>" not in shown


@pytest.mark.parametrize(
    "record",
    [
        {}, {"steps": [{}]}, {"steps": [{"plan": None, "receipt": None, "certificate": None}]},
        {"cost": None, "backend": None, "notes": None, "sizes": None, "text": None},
        {"cost": {"after": {"flops": 3}}, "backend": {"measured_ms": {"inductor": "not here"}}},
        {"steps": [{"certificate": {"outputs": {"y": {}}, "blocks": {"a": None}}}]},
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(record: dict[str, Any]) -> None:
    checked(Report(record).html())
    str(Report(record))


def test_numbers_read_well() -> None:
    assert [count(n) for n in (0, 999, 1500, 22_700_000, None)] == [
        "0", "999", "1.5 K", "22.7 M", "–"
    ]  # fmt: skip
    assert [size(n) for n in (5, 2048, 3 * 2**30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
    assert [change(4, 1), change(2, 3), change(3, 3), change(0, 1)] == [
        "−75.0 %", "+50.0 %", "same", ""
    ]  # fmt: skip
