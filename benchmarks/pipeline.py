"""How compile time grows with depth: ten passes over GPTs of 12 to 1,000 small blocks.

    python benchmarks/pipeline.py [depth ...]

CPU time of one thread. The exponent is the slope of time over nodes of the flat graph, both on
logarithmic axes: 1 is linear. Capture is printed beside it and not counted. Verification is
switched on and off in turn, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.verify import verify
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import FoldConstants, FuseProjections, Pass, QuantizeWeights

DEPTHS = (12, 50, 200, 1000)
ROUNDS = 7


def main() -> None:
    torch.set_num_threads(1)
    depths = [int(argument) for argument in sys.argv[1:]] or list(DEPTHS)
    rows = [measure(depth) for depth in depths]
    result: dict[str, Any] = {"rows": rows}
    if len(rows) > 1:
        for column in ("pipeline_s", "pipeline_gc_on_s", "capture_s"):
            result[f"exponent of {column}"] = exponent(rows, column)
    print(json.dumps(result, indent=2))


def measure(depth: int) -> dict[str, float]:
    """Time capture and the pipeline at one depth."""
    config = GPTConfig(vocab=64, context=32, dim=16, heads=2, depth=depth, ffn_dim=32)
    model = GPT(config).eval()
    begin = time.process_time()
    program = capture(model)
    captured = time.process_time() - begin
    verify(program)
    run_passes(program, passes())  # warm up
    on, off, collected = [], [], []
    for _ in range(ROUNDS):
        on.append(seconds(program, verify_each=True))
        off.append(seconds(program, verify_each=False))
        collected.append(seconds(program, verify_each=True, collect=True))
    nodes, time_on = program.nodes(), statistics.median(on)
    overheads = [a / b - 1 for a, b in zip(on, off, strict=True)]
    return {
        "depth": depth,
        "nodes": nodes,
        "classes": len(program.graphs) - 1,
        "capture_s": round(captured, 3),
        "pipeline_s": round(time_on, 4),
        "pipeline_gc_on_s": round(statistics.median(collected), 4),
        "us_per_node_per_pass": round(time_on / nodes / len(passes()) * 1e6, 3),
        "verify_overhead": round(statistics.median(overheads), 4),
    }


def passes() -> list[Pass[Any, Any]]:
    """Return ten passes, seven of which rewrite something in every block or outside."""
    quantize = QuantizeWeights
    return [
        FoldConstants(),
        FuseProjections(),
        quantize(include=("*query_key_value",)),
        FoldConstants(allow_no_match=True),
        quantize(include=("*.out",), bits=4, group_size=8),
        quantize(include=("*.up",), symmetric=False),
        FuseProjections(allow_no_match=True),
        quantize(include=("*.down",), activations="int8"),
        quantize(allow_no_match=True),
        FoldConstants(allow_no_match=True),
    ]


def seconds(program: Program, *, verify_each: bool, collect: bool = False) -> float:
    """Return the CPU time of the pipeline."""
    gc.collect()
    if not collect:
        gc.disable()
    begin = time.process_time()
    run_passes(program, passes(), verify_each=verify_each)
    taken = time.process_time() - begin
    gc.enable()
    return taken


def exponent(rows: Sequence[dict[str, float]], column: str) -> float:
    """Fit time ~ nodes ** exponent."""
    nodes = np.log([row["nodes"] for row in rows])
    times = np.log([row[column] for row in rows])
    return round(float(np.polyfit(nodes, times, 1)[0]), 3)


if __name__ == "__main__":
    main()
