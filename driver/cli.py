"""The command line: `blockwright compile | inspect | passes | models | run | bench | ...`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..backends.artefact import load
from ..ir.errors import OptionError
from . import cli_tables as tables
from .cli_bench import rivals
from .cli_bisect import bisect_command
from .cli_calls import (
    caller,
    named_tensors,
    random_tensors,
    read_tensors,
    relative_error,
    require_format,
    require_sizes,
    statistics,
    write_tensors,
)
from .cli_compile import compile_command, read_recipe
from .cli_diff import diff_command
from .cli_inputs import parse_sizes
from .cli_models import InputOptions, open_program
from .cli_new_pass import new_pass_command
from .cli_options import (
    ArtefactArgument,
    Backend,
    Debug,
    DynamicSizes,
    Inputs,
    Json,
    ModelArgument,
    Passes,
    RecipeFile,
    Seed,
    Sizes,
    Trust,
    Vocab,
)
from .cli_verify import verify_command
from .cli_view import progress, screen, show, show_json
from .doctor import examine, version
from .measure import compare
from .recipe import recipe_schema
from .register import find_pass, pass_names
from .zoo import PRESETS

app = typer.Typer(
    name="blockwright",
    help="A compiler for the structure of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # there is one of ours
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"blockwright {version()}")
        raise typer.Exit


@app.callback()
def root(
    version_: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compile the structure of transformers."""


app.command("compile")(compile_command)
app.command("verify")(verify_command)
app.command("bisect")(bisect_command)
app.command("diff")(diff_command)
app.command("new-pass")(new_pass_command)


@app.command()
def inspect(
    model: ModelArgument,
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    vocab: Vocab = None,
    cost: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Sizes to count at: batch=8,seq=128.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the graph as text.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of and what one call of it costs."""
    with screen(as_json, debug), progress() as report:
        report("capture", 0, 1)
        program = open_program(model, InputOptions(input_ or (), dynamic or (), vocab))
        sizes = parse_sizes(cost)
        require_sizes(program, sizes)
        data = tables.program_data(program, sizes)
        explanation = program.explain()
    if as_json:
        more = {"explanation": explanation.to_json()}
        show_json(data | more | ({"text": program.text()} if text else {}))
    elif text:
        typer.echo(program.text(), nl=False)
    else:
        show(*tables.program_view(data))
        typer.echo(f"\nRecognised, at the example sizes\n{explanation}")


@app.command("passes")
def passes_command(
    name: Annotated[str | None, typer.Argument(help="A pass to show in full.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of TOML recipes.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes, or show one with its options."""
    with screen(as_json, debug):
        if schema:
            show_json(recipe_schema())
            return
        data = [tables.pass_data(find_pass(each)) for each in ([name] if name else pass_names())]
    if as_json:
        show_json(data[0] if name else data)
    else:
        show(*(tables.pass_view(data[0]) if name else tables.passes_view(data)))


@app.command("models")
def models_command(as_json: Json = False, debug: Debug = False) -> None:
    """List the presets: published models by name, which MODEL may be."""
    with screen(as_json, debug):
        data = [tables.preset_data(preset) for preset in PRESETS]
    if as_json:
        show_json(data)
    else:
        show(tables.presets_view(data))


@app.command()
def run(
    artefact: ArtefactArgument,
    input_: Annotated[
        Path | None, typer.Option("--input", help="Inputs by name: npz or safetensors.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Make inputs up.")] = False,
    sizes: Sizes = None,
    vocab: Vocab = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="npz or safetensors file to write.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Run it elsewhere than saved for.")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a saved engine once; write its outputs or show figures about them."""
    with screen(as_json, debug), progress() as report:
        if (input_ is None) is not random:
            raise OptionError("a run needs inputs.", remedy="give one of --input FILE or --random.")
        if output is not None:
            require_format(output)
        report("load", 0, 1)
        engine = load(artefact, backend=backend, trust=trust)
        tensors = (
            read_tensors(input_)
            if input_
            else random_tensors(engine.program, parse_sizes(sizes), vocab, seed)
        )
        report("run", 0, 1)
        outputs = named_tensors(caller(engine, tensors)())
        if output is not None:
            write_tensors(output, outputs)
    figures = {path: statistics(tensor) for path, tensor in outputs.items()}
    written = str(output) if output else None
    if as_json:
        show_json({"backend": engine.backend, "output": written, "outputs": figures})
    else:
        show(tables.statistics_view(figures), *([f"saved {output}"] if output else []))


@app.command()
def bench(
    model: ModelArgument,
    passes: Passes = None,
    recipe: RecipeFile = None,
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    sizes: Sizes = None,
    vocab: Vocab = None,
    seed: Seed = 0,
    backend: Backend = "auto",
    against: Annotated[
        str,
        typer.Option(
            help="What to compare with, comma-separated: backends, which run the model without"
            " --pass, or saved engines. The first is the yardstick."
        ),
    ] = "eager",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; 5 or more for a verdict.")] = 9,
    budget: Annotated[float, typer.Option(min=0, help="Seconds to stop after.")] = 60.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the speed of a model or saved engine with other ways to run it.

    Rounds are interleaved; times are CPU time of one thread.
    """
    with screen(as_json, debug), progress() as report:
        given = InputOptions(input_ or (), dynamic or (), vocab, seed)
        steps = read_recipe(recipe, passes)
        engines = rivals(model, given, steps, backend, against, report)
        subject = engines[model].program
        tensors = random_tensors(subject, parse_sizes(sizes), vocab, seed)
        calls = {name: caller(engine, tensors) for name, engine in engines.items()}
        outputs = {name: named_tensors(call()) for name, call in calls.items()}
        expected = next(iter(outputs.values()))
        errors = {name: relative_error(found, expected) for name, found in outputs.items()}
        comparison = compare(
            calls, rounds=rounds, budget_s=budget, progress=lambda a, b: report("measure", a, b)
        )
    data = comparison.to_json() | {"relative_error": errors, "notes": list(subject.notes)}
    if as_json:
        show_json(data)
    else:
        notes = [f"note: {note}" for note in subject.notes]
        show(*tables.comparison_view(comparison, errors), *notes)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, what this machine can do, and what a backend lacks."""
    with screen(as_json, debug):
        data = examine()
    if as_json:
        show_json(data)
    else:
        show(*tables.doctor_view(data))
