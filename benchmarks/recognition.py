"""What recognition finds in models of transformers and diffusers; writes docs/recognition.md.

    python benchmarks/recognition.py

Every model is tiny and has random weights: what is found does not depend on sizes.
"""

from __future__ import annotations

import datetime as dt
import itertools
import warnings
from importlib import metadata
from pathlib import Path

from blockwright.testing.real_diffusion import DIFFUSION
from blockwright.testing.real_language import LANGUAGE
from blockwright.testing.real_models import RealModel, found_in
from blockwright.testing.real_vision import VISION_MODELS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recognition.md"
KINDS = ("blocks", "attentions", "networks", "branches")
COLUMNS = ("model", *KINDS, "parameters %", "FLOPs %", "captured")
INTRODUCTION = """\
# What recognition finds

Written by `make recognition`. Models of transformers and diffusers, two to four blocks, random
weights. Counts are found / expected where the two differ; blocks are counted stack by stack, and
branches are sublayers of other kinds. Parameters and FLOPs are the shares that `program.explain()`
calls understood: sublayers, norms, modulations and tables, and what lies around the blocks as long
as it is as plain as its place. Captured block by block means that blocks of one kind share a graph.
GPT-2 and Falcon are looked at after `Canonicalize`, because they spell layers as other products.
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    models = LANGUAGE | VISION_MODELS | DIFFUSION
    lines = [line(name, row) for name, row in models.items()]
    gaps = [f"- **{name}**: {missing(row)}" for name, row in models.items() if row.note]
    names = ("torch", "transformers", "diffusers")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    parts = [
        INTRODUCTION,
        f"{dt.date.today()}, {versions}; {len(models)} models.\n",
        "\n".join([table_row(COLUMNS), table_row(["---", *["---:"] * 6, "---"]), *lines, ""]),
        "## What is not understood\n",
        "\n".join([*gaps, ""]),
    ]
    PAGE.write_text("\n".join(parts))


def line(name: str, row: RealModel) -> str:
    """Return the line of one model."""
    program = row.capture(row.build())
    found, expected = found_in(program), row.expected.counts()
    counts = [
        shown(found[kind])
        if found[kind] == expected[kind]
        else f"{shown(found[kind])} / {shown(expected[kind])}"
        for kind in KINDS
    ]
    shares = [f"{100 * share:.1f}" for share in program.explain().inside()]
    how = "block by block" if program.instances else "flat"
    print(name, *counts, *shares, how, flush=True)
    return table_row([name, *counts, *shares, how])


def shown(count: int | tuple[int, ...]) -> str:
    """Return a count, or several as a sum, equal ones as a product."""
    counts = (count,) if isinstance(count, int) else count
    runs = [(value, len(list(equal))) for value, equal in itertools.groupby(counts)]
    return " + ".join(
        f"{times} x {value}" if times > 3 else " + ".join([str(value)] * times)
        for value, times in runs
    )


def missing(row: RealModel) -> str:
    """Say what is not understood, and which constants are another for it."""
    wanted = row.expected.constants()
    wrong = [f"{n} {row.gaps[n]} for {wanted[n]}" for n in row.gaps if n in wanted]
    return row.note + (f" ({', '.join(wrong)})" if wrong else "")


def table_row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
