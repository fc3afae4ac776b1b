"""From a model to an engine: capture, passes, lowering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ..backends.engine import Engine
from ..backends.registry import get_backend
from ..ir.capture import ExampleInputs, capture
from ..ir.errors import CaptureError, LoweringError
from ..ir.plain import plain
from ..ir.program import Program
from ..ir.verify import verify
from ..passes.base import Pass
from .calibration import TaskLoss, calibration_sets, example_set
from .casefile import inputs_hash
from .facts import check_recipe
from .instrument import Instruments, Which
from .manager import Progress, run_passes
from .measure import compare
from .numerics import Inputs
from .order import ordered
from .plans import Plans
from .recipe import resolve, to_text
from .recover import Recover
from .reproducer import Reproducer
from .speed import SpeedGuard
from .whole import certify_whole

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
    order: str = "given",
    plans: Plans | None = None,
    verify_each: bool = True,
    print_ir_after: Which = False,
    instruments: Instruments | None = None,
    reproducer: Reproducer | str | Path | None = None,
    checkpoint: str | Path | None = None,
    measure_speed: bool = False,
    recover: Recover | bool = True,
    loss: TaskLoss | None = None,
    allow_nonfinite: bool = False,
    seed: int = 0,
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
        calibration: More inputs like `example_inputs`. Passes that calibrate see all of them; the
            first 4 are certified on. Of an iterator, only those 4 are read.
        backend: `eager`, `onnxruntime`, `inductor`, or `auto`: the fastest of those that work
            here, measured on the example inputs, eager among them.
        options: `threads`, and options of the backend.
        order: `given`, or `auto` to solve an order from what passes require, end and establish.
        plans: Plans to carry out instead of deciding: one entry per pass (None lets it decide), or
            the path of a plan.json or of a saved engine.
        verify_each: Check the program's invariants after each pass.
        print_ir_after: Log the program after each pass, or after the passes named.
        instruments: What else to show while passes run: times, counters, graphs.
        reproducer: Directory that gets a replayable case when a pass fails.
        checkpoint: Directory that remembers passes done; a killed compile continues after them.
        measure_speed: Take back replacements that make their block slower on the backend.
        recover: How to train what passes want trained back, the program before each as teacher, on
            the calibration; False not to. Without a calibration nothing is trained.
        loss: What a task costs: takes the model's outputs and a target, returns [batch]. The
            calibration then holds pairs (inputs, target). Passes that search by quality need it.
        allow_nonfinite: Accept NaN and infinite weights.
        seed: Seed of random numbers that passes draw.
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
    recipe = ordered(resolve(passes), order)
    check_recipe(recipe)
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
    example = example_set(program, model, example_inputs)
    inputs, stream = calibration_sets(program, example, calibration, loss)
    if on_meta(program):
        inputs, stream = [], []
    compiled, steps = run_passes(
        program,
        recipe,
        inputs,
        calibration=stream,
        recover=recover if calibration is not None else False,
        plans=plans,
        verify_each=verify_each,
        print_ir_after=print_ir_after,
        instruments=instruments,
        reproducer=reproducer,
        checkpoint=checkpoint,
        speed=SpeedGuard(_target(backend), options or {}) if measure_speed else None,
        seed=seed,
        progress=progress,
    )
    record = {
        "model": Path(model).name if isinstance(model, str | Path) else type(model).__name__,
        "recipe": to_text(recipe),
        "order": order,
        "notes": list(program.notes),
        "sizes": compiled.sizes(),
        "steps": [step.to_json() for step in steps],
        "inputs": inputs_hash(inputs),
        "certificate": plain(certify_whole(program, compiled, steps, inputs)),
        "text": {"before": program.text(), "after": compiled.text()},
        "cost": {"before": program.cost().to_json(), "after": compiled.cost().to_json()},
    }
    return lower(compiled, backend, example, record, options or {}, say)


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
        flat = program.completed(inputs)
        calls = {name: _call(lowered[name], flat) for name in reversed(lowered)}
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


def _target(backend: str) -> str:
    """Return the backend blocks are timed on; of `auto`, the first that works here."""
    if backend != "auto":
        return backend
    return next(name for name in AUTO if not get_backend(name).missing())


def _call(lowered: Any, inputs: Inputs) -> Any:
    return lambda: lowered.run(inputs)
