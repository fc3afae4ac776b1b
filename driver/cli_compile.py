"""`blockwright compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_calls import read_tensors
from .cli_models import InputOptions, open_model, range_advice
from .cli_options import (
    Backend,
    CheckpointFolder,
    CrashReproducer,
    Debug,
    DynamicSizes,
    Inputs,
    IrAfter,
    IrAfterAll,
    IrAfterChange,
    IrAfterFailure,
    IrBefore,
    IrBeforeAll,
    Json,
    MeasureSpeed,
    ModelArgument,
    NoRecover,
    Order,
    Passes,
    PlanFile,
    RecipeFile,
    RecoverSteps,
    RecoverWeights,
    Seed,
    Statistics,
    Threads,
    Timing,
    Vocab,
)
from .cli_view import progress, screen, show, show_json
from .compile import compile as compile_model
from .instrument import Instruments
from .recipe import resolve
from .recipe_text import read_calls
from .recover import Recover
from .register import AnyPass


def compile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the engine goes.")],
    passes: Passes = None,
    recipe: RecipeFile = None,
    order: Order = "given",
    plan: PlanFile = None,
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    vocab: Vocab = None,
    seed: Seed = 0,
    backend: Backend = "auto",
    threads: Threads = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the backend.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="More inputs to calibrate and certify on: npz or safetensors files. Repeatable."
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
    no_verify_each: Annotated[
        bool, typer.Option("--no-verify-each", help="Skip the check of the graph after each pass.")
    ] = False,
    print_ir_before: IrBefore = None,
    print_ir_before_all: IrBeforeAll = False,
    print_ir_after: IrAfter = None,
    print_ir_after_all: IrAfterAll = False,
    print_ir_after_change: IrAfterChange = False,
    print_ir_after_failure: IrAfterFailure = False,
    timing: Timing = False,
    pass_statistics: Statistics = False,
    crash_reproducer: CrashReproducer = None,
    checkpoint: CheckpointFolder = None,
    measure_speed: MeasureSpeed = False,
    no_recover: NoRecover = False,
    recover_steps: RecoverSteps = None,
    recover_weights: RecoverWeights = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model by passes, check what they did, lower it and save the engine."""
    with screen(as_json, debug), progress() as report, range_advice():
        steps = read_recipe(recipe, passes)
        chosen = _options(threads, option)
        instruments = Instruments(
            print_ir_before=print_ir_before_all or print_ir_before or False,
            print_ir_after=print_ir_after_all or print_ir_after or False,
            print_ir_after_change=print_ir_after_change,
            print_ir_after_failure=print_ir_after_failure,
            timing=timing,
            statistics=pass_statistics,
            say=_say,
        )
        opened = open_model(model, InputOptions(input_ or (), dynamic or (), vocab, seed))
        engine = compile_model(
            opened.model,
            steps,
            opened.example_inputs,
            dynamic_shapes=opened.dynamic_shapes,
            calibration=[read_tensors(path) for path in calibration or ()] or None,
            backend=backend,
            options=chosen,
            order=order,
            plans=plan,
            verify_each=not no_verify_each,
            instruments=instruments,
            reproducer=crash_reproducer,
            checkpoint=checkpoint,
            measure_speed=measure_speed,
            recover=not no_recover and Recover(steps=recover_steps, weights=recover_weights),
            allow_nonfinite=allow_nonfinite,
            seed=seed,
            progress=report,
        )
        engine.save(output)
    if as_json:
        show_json({"output": str(output), "backend": engine.backend, "record": engine.record})
    else:
        show(engine.report, f"saved {output}")


def read_recipe(file: Path | None, texts: list[str] | None) -> list[AnyPass]:
    """Return the passes of `--recipe` and `--pass`."""
    return resolve([*([file] if file else []), *(texts or [])])


def _say(title: str, text: str) -> None:
    """Print what instruments show, beside the result: on stderr."""
    typer.echo(f"// {title}\n{text.rstrip()}\n", err=True)


def _options(threads: int | None, texts: list[str] | None) -> dict[str, Any]:
    """Read backend options in the grammar of recipes."""
    listed = ", ".join(texts or [])
    (call,) = read_calls(f"options{{{listed}}}")
    return ({"threads": threads} if threads else {}) | dict(call.options)
