"""Compile MiniLM-L6, compare it with what users have today, save it, use it in another process.

    make demo

The recipe fuses query, key and value, stores weights and embedding tables in eight bits, and
multiplies integers. Everything printed is measured in this run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from minilm_encoder import (
    QUERIES,
    Encode,
    SentenceEncoder,
    corpus,
    dynamic_shapes,
    load_encoder,
    plain_onnx,
    tokenize,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import blockwright as bw
from blockwright.driver.measure import Comparison, compare

RECIPE = "fold-constants, fuse-projections, quantize-weights{activations=int8, embeddings=true}"
BATCHES = (1, 8)
SEQ = 128
THREADS = {"threads": 1}  # every row of the table runs on one thread


def main() -> None:
    """Run the demo."""
    if sys.argv[1:2] == ["--use"]:
        use_saved(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    console = Console()
    torch.manual_seed(0)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar, torch.inference_mode():
        task = bar.add_task("load MiniLM", total=7)
        model = load_encoder()
        inputs = tokenize(list(corpus().values())[:8], SEQ)

        def step(what: str) -> None:
            bar.update(task, description=what, advance=1)

        step("compile with blockwright")
        begin = time.perf_counter()
        engine = compiled(model, RECIPE, inputs.as_tuple())
        seconds = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            exported, saved = Path(folder) / "plain.onnx", Path(folder) / "minilm.bw"
            step("export for plain ONNX Runtime")
            plain = plain_onnx(model, inputs.as_tuple(), exported)
            step("torch.compile")
            with torch.no_grad():
                inductor = torch.compile(model, dynamic=True)
                for batch in BATCHES:
                    inductor(*(t[:batch] for t in inputs.as_tuple()))
            step("measure")
            rows: dict[str, Encode] = {
                "eager": model,
                "torch.compile": inductor,
                "ONNX Runtime": plain,
                "blockwright": engine,
            }
            timings = {batch: measure(rows, inputs.as_tuple(), batch) for batch in BATCHES}
            step("save, and load in a second process")
            engine.save(saved)
            sizes = {
                "eager": 4 * sum(p.numel() for p in model.parameters()),
                "ONNX Runtime": sum(f.stat().st_size for f in exported.parent.glob("plain.onnx*")),
                "blockwright": size_of(saved),
            }
            other = in_second_process(saved)
        step("search the corpus")
        quality = {name: retrieval(encode, model) for name, encode in rows.items()}
    console.print(engine.report)
    console.print(table(engine, sizes, timings, quality))
    for batch, timing in timings.items():
        if timing.objection:
            console.print(f"[yellow]batch {batch}: no verdict: {timing.objection}[/yellow]")
    here = encode_queries(engine)
    agreement = float((here - other).abs().max())
    console.print(f"compiled in {seconds:.1f} s; the second process agrees to {agreement:.1e}")
    if agreement > 1e-5:
        raise SystemExit("the loaded engine differs from the saved one")


def compiled(model: SentenceEncoder, recipe: str, inputs: tuple[Tensor, ...]) -> bw.Engine:
    """Compile for ONNX Runtime on one thread, batch and sequence dynamic."""
    return bw.compile(
        model,
        recipe,
        inputs,
        dynamic_shapes=dynamic_shapes(),
        backend="onnxruntime",
        options=THREADS,
    )


def measure(rows: dict[str, Encode], inputs: tuple[Tensor, ...], batch: int) -> Comparison:
    """Time all rows side by side."""
    first = [tensor[:batch].clone() for tensor in inputs]
    return compare({name: partial(encode, *first) for name, encode in rows.items()}, rounds=9)


def encode_queries(encode: Encode) -> Tensor:
    """Return one vector per query, [queries, 384]."""
    with torch.no_grad():
        return encode(*tokenize(list(QUERIES)).as_tuple())


def retrieval(encode: Encode, reference: Encode) -> tuple[float, float, float]:
    """Return the smallest cosine to the reference, and how often it finds the right page first.

    Also returns how much of the reference's ten best pages it finds, on average.
    """
    pages = corpus()
    tokens = tokenize(list(pages.values()), SEQ)
    with torch.no_grad():
        documents, expected = encode(*tokens.as_tuple()), reference(*tokens.as_tuple())
    ranks = (encode_queries(encode) @ documents.T).argsort(dim=1, descending=True)
    truth = (encode_queries(reference) @ expected.T).argsort(dim=1, descending=True)
    answers = [list(pages).index(answer) for answer in QUERIES.values()]
    first = sum(int(rank[0]) == answer for rank, answer in zip(ranks, answers, strict=True))
    shared = [
        len(set(a.tolist()) & set(b.tolist())) / 10
        for a, b in zip(ranks[:, :10], truth[:, :10], strict=True)
    ]
    cosine = float((documents * expected).sum(dim=1).min())
    return cosine, first / len(answers), sum(shared) / len(shared)


def table(
    engine: bw.Engine,
    sizes: dict[str, int],
    timings: dict[int, Comparison],
    quality: dict[str, tuple[float, float, float]],
) -> Table:
    """Lay the comparison out, one column per way to run the model."""
    result = Table(title=f"MiniLM-L6, sequence {SEQ}, one thread")
    result.add_column("")
    for name in quality:
        result.add_column(name, justify="right")
    cost = engine.program.cost({"batch": 1, "seq": SEQ})

    def row(label: str, show: Callable[[str], str]) -> None:
        result.add_row(label, *(show(name) for name in quality))

    row("MB on disk", lambda name: f"{sizes[name] / 1e6:.1f}" if name in sizes else "-")
    row("parameters, M", lambda name: f"{cost.parameters / 1e6:.1f}")
    row("GFLOP per sentence", lambda name: f"{cost.flops / 1e9:.2f}")
    for batch, comparison in timings.items():
        timing = comparison.timings
        row(f"ms, batch {batch}", lambda name, t=timing: f"{t[name].median_ms:.1f}")
        row(f"speed, batch {batch}", lambda name, t=timing: f"{t[name].speedup:.2f}x")
    row("smallest cosine", lambda name: f"{quality[name][0]:.4f}")
    row("right page first", lambda name: f"{quality[name][1]:.0%}")
    row("best ten kept", lambda name: f"{quality[name][2]:.0%}")
    return result


def size_of(artefact: Path) -> int:
    """Return the bytes of weights and graph an artefact needs to run."""
    files = [f for f in artefact.rglob("*") if f.is_file() and f.suffix not in (".html",)]
    return sum(f.stat().st_size for f in files)


def in_second_process(artefact: Path) -> Tensor:
    """Load the artefact in a fresh Python and return what it makes of the queries."""
    from safetensors.torch import load_file

    result = artefact.with_name("embeddings.safetensors")
    subprocess.run([sys.executable, __file__, "--use", artefact, result], check=True)
    return load_file(result)["embeddings"]


def use_saved(artefact: Path, result: Path) -> None:
    """Load an engine and encode the queries with it: all that a user of an artefact does."""
    from safetensors.torch import save_file

    engine = bw.load(artefact)
    save_file({"embeddings": encode_queries(engine).contiguous()}, result)


if __name__ == "__main__":
    main()
