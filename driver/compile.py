"""From a model to an engine: capture, passes, lowering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..backends.engine import Engine
from ..backends.registry import get_backend
from ..ir.capture import ExampleInputs, capture, resolve_inputs
from ..ir.errors import CaptureError, LoweringError
from ..ir.program import Program
from ..ir.verify import verify
from ..passes.base import Pass
from .certify import Inputs
from .manager import Progress, run_passes
from .measure import compare
from .recipe import resolve, to_text

CALIBRATION_SETS = 4  # input sets a certificate is measured on beside the example
AUTO = ("onnxruntime", "eager")  # what backend="auto" measures on a CPU

Recipe = Sequence[Pass[Any, Any] | str] | Pass[Any, Any] | str | Path


def compile(
    model: nn.Module | ExportedProgram | Program | str | Path,
    passes: Recipe = (),
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    verify_each: bool = True,
    print_ir_after: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Compile a model into an engine.

    Args:
        model: An `nn.Module`, `ExportedProgram`, captured `Program`, or the path of a Hugging Face
            directory.
        passes: What to do, in order: passes, or a recipe as text or as the path of a TOML file.
        example_inputs: A tuple of positional or a dict of keyword arguments. Taken from the model
            where it offers some. Passes are certified on them.
        dynamic_shapes: As in `torch.export.export`.
        calibration: More inputs like `example_inputs`, to certify on; the first 4 are used.
        backend: `eager`, `onnxruntime`, `inductor`, or `auto`: the fastest of those that work
            here, measured on the example inputs, eager among them.
        options: `threads`, and options of the backend.
        verify_each: Check the program's invariants after each pass.
        print_ir_after: Log the program after each pass.
        allow_nonfinite: Accept NaN and infinite weights.
        progress: Called with (what runs, steps done, steps in all).

    Returns:
        An engine, called like the model.

    Raises:
        CaptureError: The model does not export, or holds NaN.
        OptionError: A pass, option or backend is unknown or out of range.
        NoMatchError: A pass changed nothing.
        VerifyError: A pass broke an invariant or its promise.
        LoweringError: The backend is missing or cannot run the result.
    """
    recipe = resolve(passes)
    if backend != "auto":
        get_backend(backend)
    say = progress or (lambda what, done, total: None)
    say("capture", 0, 1)
    program = (
        model
        if isinstance(model, Program)
        else capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    )
    verify(program)
    say("capture", 1, 1)
    if not allow_nonfinite:
        require_finite(program)
    inputs = _input_sets(program, model, example_inputs, calibration)
    compiled, steps = run_passes(
        program,
        recipe,
        [] if on_meta(program) else inputs,
        verify_each=verify_each,
        print_ir_after=print_ir_after,
        progress=progress,
    )
    record = {
        "model": Path(model).name if isinstance(model, str | Path) else type(model).__name__,
        "recipe": to_text(recipe),
        "notes": list(program.notes),
        "sizes": compiled.sizes(),
        "steps": [step.to_json() for step in steps],
        "text": {"before": program.text(), "after": compiled.text()},
        "cost": {"before": program.cost().to_json(), "after": compiled.cost().to_json()},
    }
    return lower(compiled, backend, inputs[0], record, options or {}, say)


def lower(
    program: Program,
    backend: str,
    inputs: Inputs,
    record: Mapping[str, Any],
    options: Mapping[str, Any],
    say: Progress,
) -> Engine:
    """Lower a program on the named backend, or on the fastest of several.

    Raises:
        LoweringError: The backend is missing, cannot run the program, or there are no weights.
    """
    if on_meta(program):
        raise LoweringError(
            "the program's weights are on the meta device, so there is nothing to run.",
            remedy="load the weights, or use capture() and run_passes() to plan without them.",
        )
    names = AUTO if backend == "auto" else (backend,)
    lowered: dict[str, Any] = {}
    for index, name in enumerate(names):
        say(f"lower to {name}", index, len(names))
        chosen = get_backend(name)
        missing = chosen.missing()
        if missing and backend != "auto":
            raise LoweringError(f"the backend {name} is not usable here.", remedy=missing)
        if missing:
            continue
        try:
            lowered[name] = chosen.lower(program, options)
        except LoweringError:
            if backend != "auto" or name == "eager":
                raise
    say("lower", len(names), len(names))
    measured: dict[str, float] = {}
    fastest = next(iter(lowered))
    if len(lowered) > 1:
        say("measure backends", 0, 1)
        calls = {name: _call(lowered[name], inputs) for name in reversed(lowered)}
        comparison = compare(calls, rounds=7, budget_s=10)
        measured = {name: timing.median_ms for name, timing in comparison.timings.items()}
        fastest = comparison.fastest
        say("measure backends", 1, 1)
    chosen_record = {"chosen": fastest, "measured_ms": measured}
    record = {**record, "backend": chosen_record}
    return Engine(program, lowered[fastest], fastest, record, options=options)


def on_meta(program: Program) -> bool:
    """Whether any weight has no data."""
    return any(tensor.device.type == "meta" for tensor in program.tensors.values())


def require_finite(program: Program) -> None:
    """Refuse NaN and infinite parameters.

    Raises:
        CaptureError: Names the first such parameter.
    """
    for name in sorted(program.parameters):
        tensor = program.tensors[name]
        floating = tensor.is_floating_point() and tensor.device.type != "meta"
        if floating and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise CaptureError(
                f"the weight {name!r} holds {count} NaN or infinite values.",
                remedy="repair the checkpoint, or pass allow_nonfinite=True.",
            )


def _input_sets(
    program: Program, model: Any, example_inputs: ExampleInputs, calibration: Iterable[Any] | None
) -> list[list[Tensor]]:
    """Return the example and the first calibration inputs as flat tensors, state included."""
    if isinstance(model, nn.Module):
        args, kwargs = resolve_inputs(model, example_inputs)
    elif isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), {}
    elif example_inputs is not None:
        args, kwargs = tuple(example_inputs), {}
    else:
        return [_example(program)]
    sets: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = [(args, kwargs)]
    for item in islice(calibration or (), CALIBRATION_SETS):
        sets.append(((), item) if isinstance(item, Mapping) else (_as_tuple(item), {}))
    return [program.arranged(program.signature.bind(a, k)) for a, k in sets]


def _example(program: Program) -> list[Tensor]:
    """Make valid inputs for a program that came without any: small integers and normal floats."""
    sizes, generator = program.sizes(), torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for spec in program.signature.inputs:
        shape = [sizes.get(d, 2) if isinstance(d, str) else d for d in spec.shape]
        value = torch.randn(shape, generator=generator)
        made.append(value.to(spec.dtype) if spec.dtype.is_floating_point else
                    torch.ones(shape, dtype=spec.dtype))  # fmt: skip
    return program.arranged(made)


def _as_tuple(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, tuple | list) else (item,)


def _call(lowered: Any, inputs: Inputs) -> Any:
    return lambda: lowered.run(inputs)
