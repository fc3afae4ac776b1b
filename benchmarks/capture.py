"""How capture grows with depth: GPTs of 4 to 1,000 small blocks, against plain `torch.export`.

    python benchmarks/capture.py [depth ...]

CPU time of one thread; model construction is not counted. `torch.export` takes its time for every
block, so it is measured up to 192 blocks. The same models are then searched for regions of every
kind, once folded into classes and once as one flat graph, which is the folded one with its calls
replaced by what they call; explaining comes on top.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from blockwright.ir.capture import capture
from blockwright.ir.flatten import flatten
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig

DEPTHS = (4, 12, 48, 192, 768, 1000)
DEEPEST_EXPORT = 192
ROUNDS = 3
T = TypeVar("T")


def main() -> None:
    torch.set_num_threads(1)
    depths = [int(argument) for argument in sys.argv[1:]] or list(DEPTHS)
    capture(*build(12)).explain()  # torch's own start-up
    rows = [measure(depth) for depth in depths]
    result: dict[str, object] = {"rows": rows}
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        result["capture, last over first"] = ratio(last, first, "capture_s")
        slope = math.log(last["capture_s"] / first["capture_s"])
        result["exponent of capture_s"] = round(slope / math.log(last["nodes"] / first["nodes"]), 3)
        for column in ("folded_us_per_node", "flat_us_per_node"):
            result[f"{column}, last over first"] = ratio(last, first, column)
    print(json.dumps(result, indent=2))


def build(depth: int) -> tuple[GPT, tuple[Tensor, ...]]:
    """Return a GPT of small blocks and example inputs, shapes without numbers."""
    config = GPTConfig(vocab=64, context=32, dim=16, heads=2, depth=depth, ffn_dim=32)
    with torch.device("meta"):
        model = GPT(config).eval()
        return model, model.example_inputs()


def measure(depth: int) -> dict[str, float]:
    """Time capture, plain export and recognition at one depth."""
    model, inputs = build(depth)
    rounds = (timed(lambda: capture(model, inputs)) for _ in range(ROUNDS))
    taken, program = min(rounds, key=first_of)
    nodes = program.nodes()
    row = {
        "depth": depth,
        "nodes": nodes,
        "classes": len(program.graphs) - 1,
        "capture_s": round(taken, 3),
        "capture_nodes_per_s": round(nodes / taken),
    }
    if depth <= DEEPEST_EXPORT:
        exported, _ = timed(lambda: torch.export.export(model, inputs))
        row["export_s"] = round(exported, 3)
        row["export_over_capture"] = round(exported / taken, 1)
    for name, searched in (("folded", program), ("flat", flatten(program))):
        found, _ = timed(lambda searched=searched: search(searched))  # type: ignore[misc]
        told, _ = timed(searched.explain)
        row[f"{name}_nodes_per_s"] = round(nodes / found)
        row[f"{name}_us_per_node"] = round(found / nodes * 1e6, 3)
        row[f"{name}_explain_us_per_node"] = round(told / nodes * 1e6, 3)
    return row


def search(program: Program) -> None:
    """Recognise everything there is."""
    program.attentions(), program.feed_forwards(), program.norms(), program.embeddings()
    program.stacks(), program.modulations(), program.heads()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU time of some work, and its result."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def first_of(pair: tuple[float, object]) -> float:
    """Return the time of a timed result."""
    return pair[0]


def ratio(last: dict[str, float], first: dict[str, float], column: str) -> float:
    """Return how many times larger a column is in the last row."""
    return round(last[column] / first[column], 2)


if __name__ == "__main__":
    main()
