"""`blockwright verify SUBJECT ORIGINAL`: does one thing compute what the other does?

What is compared how depends on the two: `CHECKS` holds one entry per kind of pair, asked in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import RenderableType

from ..ir.errors import OptionError
from .calibration import calibration_sets, example_set
from .cli_calls import read_tensors
from .cli_models import InputOptions, is_artefact, open_model, program_of
from .cli_options import Debug, DynamicSizes, Inputs, Json, Seed, Trust, Vocab
from .cli_verify_foreign import is_foreign, verify_files, view_foreign
from .cli_view import progress, screen, show, show_json, table
from .verify_artefact import Verification, verify_artefact


class Finding(Protocol):
    """What a check returns."""

    @property
    def ok(self) -> bool:
        """Whether everything is as claimed."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""


@dataclass(frozen=True)
class Request:
    """What the command was asked.

    Attributes:
        subject: First argument.
        original: Second argument.
        given: What was said about inputs.
        calibration: Files of further inputs.
        against: The subject before it was rewritten, if that is known.
        trust: Whether files that can hold code may be read.
    """

    subject: str
    original: str
    given: InputOptions
    calibration: Sequence[Path] = ()
    against: Path | None = None
    trust: bool = False


@dataclass(frozen=True)
class Check:
    """A kind of pair.

    Attributes:
        pair: In words, for the list of what can be verified.
        takes: Whether a request is of this kind.
        run: Does the work.
        view: Shows what came of it.
    """

    pair: str
    takes: Callable[[Request], bool]
    run: Callable[[Request], Finding]
    view: Callable[[Any], list[RenderableType]]


def _against_model(request: Request) -> Finding:
    opened = open_model(request.original, request.given)
    program = program_of(opened)
    example = example_set(program, opened.model, opened.example_inputs)
    files = [read_tensors(path) for path in request.calibration] or None
    inputs, _ = calibration_sets(program, example, files)
    return verify_artefact(Path(request.subject), program, inputs)


def _against_foreign(request: Request) -> Finding:
    return verify_files(
        request.subject, request.original, request.given, request.against, request.trust
    )


def verify_command(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="A saved engine, an ONNX file or a .pt2 file.")
    ],
    original: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model it was made of; may come first.")
    ],
    input_: Inputs = None,
    dynamic: DynamicSizes = None,
    vocab: Vocab = None,
    seed: Seed = 0,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Inputs it was certified on: npz or safetensors files. Repeatable."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The graph before it was rewritten; names values."),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a saved engine, or a graph of any origin, against the model it was made of.

    Exit code 1 when something is not as claimed; the first block or node that disagrees is named.
    """
    with screen(as_json, debug), progress() as report:
        report("verify", 0, 1)
        given = InputOptions(input_ or (), dynamic or (), vocab, seed)
        request = Request(subject, original, given, calibration or (), against, trust)
        check = _check(request)
        finding = check.run(request)
    if as_json:
        show_json(finding.to_json())
    else:
        show(*check.view(finding))
    if not finding.ok:
        raise typer.Exit(1)


def _check(request: Request) -> Check:
    for check in CHECKS:
        if check.takes(request):
            return check
    pairs = "; or ".join(check.pair for check in CHECKS)
    raise OptionError(
        f"cannot verify {request.subject!r} against {request.original!r}.",
        remedy=f"give {pairs}.",
    )


def _view(finding: Verification) -> list[RenderableType]:
    data = finding.to_json()
    certificate = data["certificate"]
    errors = [
        (name, *(_number(error[key]) for key in ("old", "new", "difference", "cosine")))
        for name, error in certificate["outputs"].items()
    ]
    costs = [
        (name.replace("_", " "), f"{count['predicted']:,}", f"{count['measured']:,}")
        for name, count in certificate["costs"].items()
    ]
    wrong = [(each["where"], each["what"]) for each in data["disagreements"]]
    parts = [
        table("Error of outputs", ("", "#model to fp64", "#engine to fp64", "#apart", "#cosine"),
              errors),
        table("\nCosts of one call", ("", "#predicted", "#measured"), costs),
    ]  # fmt: skip
    if wrong:
        parts.append(table("\nNot as claimed", ("where", "what"), wrong))
    notes = [f"note: {note}" for note in data["notes"]]
    return [*parts, *notes, "everything is as claimed." if finding.ok else "verification failed."]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


CHECKS = [
    Check(
        "a graph of any origin (.onnx, .pt2) and the model it was made of",
        lambda request: is_foreign(request.subject) or is_foreign(request.original),
        _against_foreign,
        view_foreign,
    ),
    Check(
        "a saved engine and the model it was made of",
        lambda request: is_artefact(request.subject) and not Path(request.original).is_file(),
        _against_model,
        _view,
    ),
]
