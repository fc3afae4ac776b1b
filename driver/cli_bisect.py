"""`blockwright bisect`: where a recipe or an engine goes wrong, and a case that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from ..backends import container
from ..backends.registry import get_backend
from ..ir.errors import ArtefactError, LoweringError, OptionError
from ..ir.program import Program
from . import bisect_case, reproducer
from .bisect import Bisection, Progress, bisect
from .bisect_backend import EngineBisection, bisect_backend
from .bisect_pass import Applied
from .bisect_search import METRICS, Bound
from .calibration import calibration_sets, example_set
from .cli_calls import read_tensors
from .cli_compile import read_recipe
from .cli_models import InputOptions, open_model, program_of
from .cli_options import Debug, DynamicSizes, Inputs, Json, Passes, RecipeFile, Seed, Vocab
from .cli_view import progress, screen, show, show_json, table
from .numerics import Inputs as FlatInputs
from .register import AnyPass


def bisect_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="As in `blockwright compile`; none with --run."),
    ] = None,
    passes: Passes = None,
    recipe: RecipeFile = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Bisect this engine of the model, after --pass, against eager."),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(help="Largest error allowed, as in 1e-3. Default: what rounding explains."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(METRICS),
            help="relative: norm of the difference over the norm; cosine: one minus the smallest"
            " cosine; rounding: the rule exact passes are held to.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write the smallest failing case."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Replay a case of -o or --crash-reproducer."),
    ] = None,
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    vocab: Vocab = None,
    seed: Seed = 0,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="More inputs to measure on: npz or safetensors files. Repeatable."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pass, block and op at which a recipe exceeds a bound, in O(log n) runs.

    Or the op that an engine gets wrong. Exit code 0: all within the bound, or the replayed fault is
    gone; 1: found, or still there.
    """
    with screen(as_json, debug), progress() as report:
        if (model is None) is (run is None):
            raise OptionError("what to bisect?", remedy="give one of MODEL and --run DIR.")
        if run is not None:
            failed, parts, data = _replay(run)
        else:
            assert model is not None
            allowed = Bound(bound, metric or ("rounding" if bound is None else "relative"))
            given = InputOptions(input_ or (), dynamic or (), vocab, seed)
            program, inputs = _subject(model, given, calibration or [], report)
            steps = read_recipe(recipe, passes)
            if backend is None:
                failed, parts, data = _recipe(program, steps, inputs, allowed, output, seed, report)
            else:
                for pass_ in steps:
                    program = Applied.of(pass_, program, inputs, seed=seed).after()
                failed, parts, data = _engine(program, backend, inputs, allowed, output, report)
    if as_json:
        show_json(data)
    else:
        show(*parts)
    if failed:
        raise typer.Exit(1)


Outcome = tuple[bool, list[RenderableType], dict[str, Any]]


def _subject(
    model: str, given: InputOptions, files: list[Path], report: Progress
) -> tuple[Program, list[FlatInputs]]:
    report("capture", 0, 1)
    opened = open_model(model, given)
    program = program_of(opened)
    example = example_set(program, opened.model, opened.example_inputs)
    more = [read_tensors(path) for path in files] or None
    inputs, _ = calibration_sets(program, example, more)
    return program, list(inputs)


def _recipe(
    program: Program,
    steps: list[AnyPass],
    inputs: list[FlatInputs],
    bound: Bound,
    output: Path | None,
    seed: int,
    report: Progress,
) -> Outcome:
    if not steps:
        raise OptionError(
            "there is no recipe to bisect.", remedy="give --pass, --recipe, or --backend."
        )
    found = bisect(program, steps, inputs, bound, seed=seed, progress=report)
    case = None
    if found.culprit is not None and output is not None:
        case = bisect_case.case_of_pass(found.culprit, bound)
    return _outcome(found, f"the recipe{_runs(found)}", case, output)


def _engine(
    program: Program,
    name: str,
    inputs: list[FlatInputs],
    bound: Bound,
    output: Path | None,
    report: Progress,
) -> Outcome:
    backend = get_backend(name)
    missing = backend.missing()
    if missing:
        raise LoweringError(f"the backend {name} is not usable here.", remedy=missing)
    found = bisect_backend(program, backend, inputs, bound, progress=report)
    case = None
    if found.culprit is not None and output is not None:
        case = bisect_case.case_of_engine(found, found.culprit, backend, inputs, {})
    return _outcome(found, f"{name} ({found.lowered} programs lowered)", case, output)


def _runs(found: Bisection) -> str:
    return f" ({found.runs} runs of the model)"


def _outcome(
    found: Bisection | EngineBisection,
    subject: str,
    case: bisect_case.Case | None,
    output: Path | None,
) -> Outcome:
    data = found.to_json() | {"output": None}
    verdict = "stays within" if found.culprit is None else "exceeds"
    parts: list[RenderableType] = [f"{subject} {verdict} {found.bound}: {found.error:.3g}"]
    if found.culprit is not None:
        parts += _culprit_view(data["culprit"])
    if case is not None and output is not None:
        bisect_case.write(output, case)
        data["output"] = str(output)
        parts.append(f"\nsaved {output}; replay it with `blockwright bisect --run {output}`")
    return found.culprit is not None, parts, data


def _culprit_view(culprit: Mapping[str, Any]) -> list[RenderableType]:
    errors = {name: value for name, value in culprit["error"].items() if value is not None}
    op = culprit["op"]["text"] if isinstance(culprit["op"], dict) else culprit["op"]
    rows = [
        (name, culprit[name])
        for name in ("pass", "block", "region", "path", "made_by")
        if culprit.get(name)
    ]
    rows += [("op", op), ("error", ", ".join(f"{v:.3g} {_name(n)}" for n, v in errors.items()))]
    parts: list[RenderableType] = [table("", ("", ""), rows)]
    if culprit.get("accumulates"):
        parts.append("errors add up: this block alone stays within the bound.")
    return parts


def _name(error: str) -> str:
    return error.replace("_", " ")


def _replay(folder: Path) -> Outcome:
    """Replay a case of either kind."""
    manifest, _ = container.read(folder)
    if manifest.get("kind") == bisect_case.KIND:
        replayed = bisect_case.replay(folder)
        errors = {"error": replayed.error, "recorded": replayed.case.error}
        return replayed.same, [str(replayed)], {"same": replayed.same, **errors}
    if manifest.get("kind") == reproducer.KIND:
        crashed = reproducer.replay(folder)
        now = reproducer.error_text(crashed.error) if crashed.error else None
        about = {"same": crashed.same, "error": now, "recorded": crashed.case.error}
        return crashed.error is not None, [str(crashed)], about
    raise ArtefactError(
        f"{folder} holds no case to replay.",
        where=container.MANIFEST,
        remedy="give a directory of `bisect -o` or `compile --crash-reproducer`.",
    )
