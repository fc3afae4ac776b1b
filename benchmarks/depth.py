"""Engines of a third fewer blocks: is the time saved what the FLOPs say?

    python benchmarks/depth.py [onnxruntime] [inductor]

A decoder and a diffusion transformer of twelve blocks, batch 8, sequence 256, one thread, random
weights. Each is compared with the same model after `drop-blocks` has taken a third of the blocks,
which is also the structure FuseBlocks and PruneContiguous leave. Rounds are interleaved.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

import blockwright as bw
from blockwright.driver.measure import compare
from blockwright.models.dit import DiT, DiTConfig
from blockwright.models.gpt import GPT, GPTConfig

ROUNDS = 9
BATCH, SEQUENCE = 8, 256
DROPPED = (2, 4, 6, 8)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backends = sys.argv[1:] or ["onnxruntime", "inductor"]
    print(json.dumps([measure(name, backend) for name in MODELS for backend in backends], indent=2))


def gpt() -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a decoder and a batch for it."""
    config = GPTConfig(vocab=512, context=SEQUENCE, dim=256, heads=4, depth=12, ffn_dim=1024)
    return GPT(config).eval(), (torch.randint(0, 512, (BATCH, SEQUENCE)),)


def dit() -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a diffusion transformer whose images are cut into 256 patches, and a batch for it."""
    config = DiTConfig(classes=10, dim=256, heads=4, depth=12, ffn_dim=1024)
    model = DiT(config).eval()
    return model, model.example_inputs(BATCH)


MODELS = {"gpt": gpt, "dit": dit}


def measure(name: str, backend: str) -> dict[str, Any]:
    """Compare the whole model with two thirds of it."""
    model, inputs = MODELS[name]()
    program = bw.capture(model, inputs)
    passes = [bw.DropBlocks(blocks=DROPPED)]
    options = {"threads": 1}
    whole = bw.compile(program, [], inputs, backend=backend, options=options)
    fewer = bw.compile(program, passes, inputs, backend=backend, options=options)
    found = compare(
        {"whole": lambda: whole(*inputs), "fewer": lambda: fewer(*inputs)}, rounds=ROUNDS
    )
    timing = found.timings["fewer"]
    flops = fewer.program.cost().flops / whole.program.cost().flops
    return {
        "model": name,
        "backend": backend,
        "flops": round(flops, 3),
        "time": round(1 / timing.speedup, 3),
        "interval": [round(1 / bound, 3) for bound in reversed(timing.interval)],
        "time_by_flops": round(1 / timing.speedup / flops, 3),
        "noise": round(found.noise, 2),
        "verdict": found.verdict,
    }


if __name__ == "__main__":
    main()
