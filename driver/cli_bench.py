"""What `blockwright bench` compares: a model or saved engine, and other ways to run it."""

from __future__ import annotations

from pathlib import Path

from ..backends.artefact import load
from ..backends.engine import Engine
from .cli_models import InputOptions, is_artefact, open_model, program_of
from .cli_view import Report
from .compile import compile as compile_model
from .register import AnyPass


def rivals(
    model: str,
    given: InputOptions,
    steps: list[AnyPass],
    backend: str,
    against: str,
    report: Report,
) -> dict[str, Engine]:
    """Return what to compare by name, the subject last, everything on one thread."""
    report("capture", 0, 1)
    if is_artefact(model):
        saved = load(Path(model), backend=None if backend == "auto" else backend)
        program, inputs, backend = saved.program, None, saved.backend
    else:
        opened = open_model(model, given)
        program, inputs = program_of(opened), opened.example_inputs
    engines: dict[str, Engine] = {}
    names = [name for name in map(str.strip, against.split(",")) if name]
    one_thread = {"threads": 1}
    for name in names:
        report(f"prepare {name}", len(engines), len(names) + 1)
        if is_artefact(name):
            saved = load(Path(name))
            engines[name] = compile_model(saved.program, backend=saved.backend, options=one_thread)
        else:
            engines[name] = compile_model(program, (), inputs, backend=name, options=one_thread)
    report(f"prepare {model}", len(engines), len(engines) + 1)
    engines[model] = compile_model(program, steps, inputs, backend=backend, options=one_thread)
    return engines
