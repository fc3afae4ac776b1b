"""Engines of BERT-base before and after pruning, batch 1 and 8, sequence 128, one thread.

    python benchmarks/pruning.py [onnxruntime] [inductor]

The structure is one as AxFormer finds them (arXiv:2010.03688: up to 3.2 times smaller, up to 2.5
times faster): the last three layers are gone but for their norms, the three before keep six heads
and no feed-forward network, the first six keep eight heads and half of their neurons. Weights are
random, so only speed, size and agreement with eager PyTorch are measured. Rounds are interleaved.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.measure import compare
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.bert import BERT_BASE, Bert
from blockwright.passes import Plan, PruneAccuracyDriven
from blockwright.passes.shared.cut import Cut

SEQUENCE = 128
ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    backends = sys.argv[1:] or ["onnxruntime", "inductor"]
    torch.manual_seed(0)
    model = Bert(BERT_BASE).eval()
    rows = [measure(model, backend, batch) for backend in backends for batch in (1, 8)]
    print(json.dumps({"sizes": sizes(model), "rows": rows}, indent=2))


def structure(program: Program) -> Plan[Cut]:
    """Return what goes of which sublayer."""
    heads, neurons = tuple(range(12)), tuple(range(3072))
    decisions: dict[str, Cut] = {}
    for region in PruneAccuracyDriven().regions(program):
        layer = int(str(region.instance).rpartition(".")[2])
        dropped = region.label.endswith(".residual")
        if dropped and (layer >= 9 or (layer >= 6 and "up_down" in region.label)):
            decisions[region.label] = Cut(drop=True)
        elif not dropped and layer < 9 and region.kind == "attention":
            kept = heads[:8] if layer < 6 else heads[:6]
            decisions[region.label] = Cut(keep=kept, removed=12 - len(kept))
        elif not dropped and layer < 6:
            decisions[region.label] = Cut(keep=neurons[:1536], removed=1536)
    return Plan(decisions)


def pruned(program: Program) -> Program:
    """Return a program of that structure."""
    new, _ = run_passes(program, [PruneAccuracyDriven()], plans=[structure(program)])
    return new


def measure(model: Bert, backend: str, batch: int) -> dict[str, Any]:
    """Compare an engine of the whole model with one of the pruned model."""
    inputs = model.example_inputs(batch, SEQUENCE)
    program = bw.capture(model, inputs)
    small = pruned(program)
    engines = {
        name: bw.compile(p, [], inputs, backend=backend, options={"threads": 1})
        for name, p in (("whole", program), ("pruned", small))
    }
    calls = {name: partial(engine, *inputs) for name, engine in engines.items()}
    found = compare(calls, rounds=ROUNDS)
    timing = found.timings["pruned"]
    return {
        "backend": backend,
        "batch": batch,
        "speedup": round(timing.speedup, 2),
        "interval": [round(bound, 2) for bound in timing.interval],
        "whole_ms": round(found.timings["whole"].median_ms, 1),
        "pruned_ms": round(timing.median_ms, 1),
        "noise": round(found.noise, 2),
        "verdict": found.verdict,
        "difference": difference(engines["pruned"](*inputs), run(small, inputs)),
    }


def sizes(model: Bert) -> dict[str, float]:
    """Return how much smaller the pruned model is, and its blocks alone."""
    inputs = model.example_inputs(1, SEQUENCE)
    program = bw.capture(model, inputs)
    cut = pruned(program).cost()
    cost = program.cost()
    outside = sum(t.numel() for name, t in program.tensors.items() if "blocks." not in name)
    return {
        "parameters": cost.parameters,
        "pruned_parameters": cut.parameters,
        "smaller": round(cost.parameters / cut.parameters, 2),
        "blocks_smaller": round((cost.parameters - outside) / (cut.parameters - outside), 2),
        "flops_ratio": round(cost.flops / cut.flops, 2),
    }


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two results, relative to their largest entry."""
    pairs: list[tuple[Tensor, Tensor]] = list(zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    main()
