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
    SentenceEncoder,
    corpus,
    dynamic_shapes,
    load_encoder,
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

Encode = Callable[[Tensor, Tensor], Tensor]


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
        step("lower the unchanged model to ONNX Runtime")
        plain = compiled(model, "", inputs.as_tuple())
        step("torch.compile")
        with torch.no_grad():
            inductor = torch.compile(model, dynamic=True)
            for batch in BATCHES:
                inductor(*(t[:batch] for t in inputs.as_tuple()))
        step("measure")
        rows: dict[str, Encode] = {
            "PyTorch eager": model,
            "torch.compile": inductor,
            "ONNX Runtime fp32": plain,
            "blockwright": engine,
        }
        timings = {batch: measure(rows, inputs.as_tuple(), batch) for batch in BATCHES}
        step("save, and load in a second process")
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "minilm.bw"
            engine.save(saved)
            plain.save(Path(folder) / "plain.bw")
            sizes = {
                "PyTorch eager": 4 * sum(p.numel() for p in model.parameters()),
                "ONNX Runtime fp32": size_of(Path(folder) / "plain.bw"),
                "blockwright": size_of(saved),
            }
            other = in_second_process(saved)
        step("search the corpus")
        quality = {name: retrieval(encode, model) for name, encode in rows.items()}
    console.print(engine.report)
    console.print(table(rows, engine, plain, sizes, timings, quality))
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
    rows: dict[str, Encode],
    engine: bw.Engine,
    plain: bw.Engine,
    sizes: dict[str, int],
    timings: dict[int, Comparison],
    quality: dict[str, tuple[float, float, float]],
) -> Table:
    """Lay the comparison out."""
    result = Table(title=f"MiniLM-L6, sequence {SEQ}, one thread")
    result.add_column("")
    for heading in (
        "MB on disk", "parameters", "GFLOP",
        *(f"ms, batch {batch}" for batch in BATCHES), *(f"speed, batch {b}" for b in BATCHES),
        "min cosine", "right page first", "top 10 kept",
    ):  # fmt: skip
        result.add_column(heading, justify="right")
    for name in rows:
        cost = (engine if name == "blockwright" else plain).program.cost({"batch": 1, "seq": SEQ})
        cosine, first, kept = quality[name]
        result.add_row(
            name,
            f"{sizes[name] / 1e6:.1f}" if name in sizes else "-",
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.flops / 1e9:.2f}",
            *(f"{timings[batch].timings[name].median_ms:.1f}" for batch in BATCHES),
            *(f"{timings[batch].timings[name].speedup:.2f}x" for batch in BATCHES),
            f"{cosine:.4f}",
            f"{first:.0%}",
            f"{kept:.0%}",
        )
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
