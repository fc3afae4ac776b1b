"""What `blockwright verify` does with a graph made by someone else, and how it shows it."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from .cli_models import InputOptions, open_model
from .cli_view import table
from .locate import Suspect
from .verify_foreign import ForeignVerification, Shape, verify

SUFFIXES = (".onnx", ".pt2")


def is_foreign(text: str) -> bool:
    """Whether an argument is the file of a graph."""
    return Path(text).suffix in SUFFIXES


def verify_files(
    subject: str, original: str, given: InputOptions, against: Path | None, trust: bool
) -> ForeignVerification:
    """Check a file against a model; either may come first."""
    file, text = (subject, original) if is_foreign(subject) else (original, subject)
    opened = open_model(text, given)
    return verify(
        opened.model,
        file,
        opened.example_inputs,
        dynamic_shapes=opened.dynamic_shapes,
        against=against,
        seed=given.seed,
        trust=trust,
    )


def view_foreign(finding: ForeignVerification) -> list[RenderableType]:
    """Return a line per shape, and what is known of each suspect."""
    parts: list[RenderableType] = [
        table(
            f"{finding.subject} against the model",
            ("sizes", "#model to fp64", "#graph to fp64", ""),
            map(_row, finding.shapes),
        )
    ]
    for suspect in finding.suspects:
        parts.append(table("\nFirst node that goes wrong", ("", ""), _facts(suspect)))
    parts += [f"note: {note}" for note in finding.notes]
    return [
        *parts,
        "the graph computes what the model does." if finding.ok else "verification failed.",
    ]


def _row(shape: Shape) -> tuple[str, str, str, str]:
    sizes = ", ".join(f"{name}={size}" for name, size in shape.sizes.items())
    if shape.failure is not None:
        return sizes, "", "", "does not run"
    name = (
        shape.wrong[0]
        if shape.wrong
        else max(shape.outputs, key=lambda n: shape.outputs[n].new or 0)
    )
    error = shape.outputs.get(name)
    old, new = (error.old, error.new) if error else (None, None)
    return (
        sizes,
        _number(old),
        _number(new),
        f"wrong: {', '.join(shape.wrong)}" if shape.wrong else "right",
    )


def _facts(suspect: Suspect) -> list[tuple[str, str]]:
    attributes = ", ".join(f"{name}={value}" for name, value in suspect.attributes.items())
    constants = ", ".join(f"{name}={value}" for name, value in suspect.constants.items())
    facts = [
        ("node", f"{suspect.node} ({'.'.join(filter(None, (suspect.domain, suspect.op)))})"),
        ("stands for", suspect.region),
        ("it says", attributes),
        ("the model", constants),
        *(("reads", f"{name}: {ours}") for name, ours in suspect.reads.items()),
        *(("hint", hint) for hint in suspect.hints),
        ("also wrong", ", ".join(suspect.also)),
    ]
    return [(name, text) for name, text in facts if text]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
