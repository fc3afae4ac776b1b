"""MiniLM-L6 against what users have today, at batch 1 and 8, sequence 128, on one thread.

    python benchmarks/minilm.py

Every row runs the same weights in the same process, rounds interleaved, CPU time; the noise gate of
`driver/measure.py` may refuse a verdict. Quality is the smallest cosine of sentence vectors against
the fp32 model over the pages of Python's manual.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.measure import compare

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from minilm_encoder import (
    Encode,
    SentenceEncoder,
    corpus,
    dynamic_shapes,
    load_encoder,
    onnx_session,
    plain_onnx,
    tokenize,
)

BATCHES, SEQ = (1, 8), 128
THREADS = {"threads": 1}
SETTINGS = {
    "blockwright fp32": "fold-constants, fuse-projections",
    "blockwright int8": (
        "fold-constants, fuse-projections, quantize-weights{activations=int8, embeddings=true}"
    ),
    "blockwright int8 weights": (
        "fold-constants, fuse-projections, quantize-weights{embeddings=true}"
    ),
}


def main() -> None:
    if sys.argv[1:] == ["--memory"]:
        print(json.dumps(memory()))
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = load_encoder()
    inputs = tokenize(list(corpus().values())[:8], SEQ).as_tuple()
    result: dict[str, Any] = {"memory": json.loads(own_process("--memory"))}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows: dict[str, Encode] = {"eager": model}
        rows["torch.compile"] = torch.compile(model, dynamic=False)
        peers = onnx_peers(model, inputs, Path(folder))
        rows |= peers
        for name, recipe in SETTINGS.items():
            engine = compiled(model, recipe, inputs, "onnxruntime")
            engine.save(Path(folder) / name)
            result[f"size of {name}"] = round(disk(Path(folder) / name) / disk_fp32(model), 4)
            rows[name] = engine
        chosen = compiled(model, SETTINGS["blockwright int8"], inputs, "auto")
        result["auto"] = chosen.record["backend"]
        result["quality"] = {name: quality(encode, model) for name, encode in rows.items()}
        for batch in BATCHES:
            first = [tensor[:batch].clone() for tensor in inputs]
            calls = {name: partial(encode, *first) for name, encode in rows.items()}
            result[f"batch {batch}"] = summary(compare(calls, rounds=15))
    print(json.dumps(result, indent=2))


def compiled(
    model: SentenceEncoder, recipe: str, inputs: tuple[Tensor, ...], backend: str
) -> bw.Engine:
    return bw.compile(
        model, recipe, inputs, dynamic_shapes=dynamic_shapes(), backend=backend, options=THREADS
    )


def onnx_peers(
    model: SentenceEncoder, inputs: tuple[Tensor, ...], folder: Path
) -> dict[str, Encode]:
    """Return ONNX Runtime on the exported model, as it comes and quantized by its own tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, small = folder / "plain.onnx", folder / "small.onnx"
    rows = {"ONNX Runtime fp32": plain_onnx(model, inputs, plain)}
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
    return rows | {"ONNX Runtime dynamic int8": onnx_session(small)}


def quality(encode: Encode, reference: Encode) -> dict[str, float]:
    """Return the smallest and the mean cosine to the reference over all pages, in batches of 8."""
    ids, mask = tokenize(list(corpus().values()), SEQ).as_tuple()
    cosines = torch.cat(
        [
            (encode(a, b) * reference(a, b)).sum(dim=1)
            for a, b in zip(ids.split(8), mask.split(8), strict=True)
            if len(a) == 8
        ]
    )
    return {"min": round(float(cosines.min()), 5), "mean": round(float(cosines.mean()), 5)}


def summary(comparison: Any) -> dict[str, Any]:
    rows = {
        name: {
            "ms": round(timing.median_ms, 2),
            "speed": round(timing.speedup, 3),
            "interval": [round(bound, 3) for bound in timing.interval],
        }
        for name, timing in comparison.timings.items()
    }
    return {"verdict": comparison.verdict, "noise": round(comparison.noise, 3), **rows}


def disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".html")


def disk_fp32(model: SentenceEncoder) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def memory() -> dict[str, float]:
    """Compile in a process of its own and watch its anonymous memory."""
    model = load_encoder()
    weights = disk_fp32(model)
    inputs = tokenize(list(corpus().values())[:8], SEQ).as_tuple()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, cpu = time.perf_counter(), time.process_time()
    compiled(model, SETTINGS["blockwright int8"], inputs, "onnxruntime")
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    done.set()
    watcher.join()
    limit = 2 * weights + 600e6
    return {
        "weights_mb": round(weights / 1e6, 1),
        "anonymous_before_mb": round(before / 1e6, 1),
        "anonymous_peak_mb": round(peak[0] / 1e6, 1),
        "share_of_target": round(peak[0] / limit, 3),
        "compile_wall_s": round(wall, 2),
        "compile_cpu_s": round(cpu, 2),
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


def anonymous() -> int:
    """Return the bytes of private memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def own_process(argument: str) -> str:
    run = subprocess.run(
        [sys.executable, __file__, argument], check=True, capture_output=True, text=True
    )
    return run.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
