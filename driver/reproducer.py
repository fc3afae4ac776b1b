"""A directory that shows a pass failing again, on another machine if need be.

    case.json              the pass, its plan, the error, seed and versions
    graph.json             the program the pass was given
    weights.safetensors    its weights; large cases go without and replay on zeros
    inputs.safetensors     what was certified on

Data only: replaying interprets it and runs the pass installed under that name.

Source: MLIR's crash reproducer, https://mlir.llvm.org/docs/PassManagement/#crash-and-failure-reproduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import container, plainjson, weights
from ..backends.plainjson import dumps
from ..ir.errors import ArtefactError, BlockwrightError
from ..ir.literals import dtype_from
from ..ir.plain import fit
from ..ir.program import Program
from ..ir.serialize import from_json, to_json
from ..passes.base import Pass, Plan
from .casefile import named, read_tensors, unnamed, versions
from .numerics import Inputs
from .options import options_of
from .recipe import to_text
from .recipe_text import read_calls
from .register import build_pass

WEIGHTS_LIMIT_BYTES = 1 << 30  # programs above this are kept without their weights
CASE, GRAPH, WEIGHTS, INPUTS = (
    "case.json",
    "graph.json",
    "weights.safetensors",
    "inputs.safetensors",
)
KIND = "crash reproducer"


@dataclass(frozen=True)
class Reproducer:
    """Where to write failing cases, and how.

    Attributes:
        folder: The directory; an older case in it is replaced.
        weights: Whether to keep weights; None to keep those of programs up to a gibibyte.
    """

    folder: Path
    weights: bool | None = None


@dataclass(frozen=True)
class Case:
    """A pass, a program and what went wrong.

    Attributes:
        pass_: The pass that failed.
        program: What it was given; weights are zeros that take no memory if they were left out.
        inputs: Input sets it was certified on; none without weights.
        calibration: Input sets it measured on; none without weights.
        plan: What it had decided when it failed; None if it failed before.
        seed: Seed of its random numbers.
        verify_each: Whether the graph was verified afterwards.
        error: Type and text of the error.
        versions: Versions it happened with.
    """

    pass_: Pass[Any, Any]
    program: Program
    inputs: Sequence[Inputs]
    calibration: Sequence[Inputs]
    plan: Plan[Any] | None
    seed: int
    verify_each: bool
    error: tuple[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Replay:
    """What happened when a case was run again.

    Attributes:
        case: The case.
        error: The error it raised; None when it did not fail.
        same: Whether that is the recorded error.
    """

    case: Case
    error: Exception | None
    same: bool

    def __str__(self) -> str:
        """Render in a few lines."""
        kind, text = self.case.error
        lines = [f"{self.case.pass_}", f"recorded: {kind}: {text}"]
        if self.same:
            return "\n".join([*lines, "replayed: the same error"])
        now = "no error" if self.error is None else "{}: {}".format(*error_text(self.error))
        lines.append(f"replayed: {now}")
        here = versions()
        pairs = [(name, old) for name, old in self.case.versions.items() if here.get(name) != old]
        changed = ", ".join(f"{name} {old} -> {here.get(name)}" for name, old in pairs)
        return "\n".join([*lines, f"versions: {changed}"] if changed else lines)


def error_text(error: BaseException) -> tuple[str, str]:
    """Return type and text of an error, as a case records them."""
    return type(error).__name__, str(error)


def write(reproducer: Reproducer, case: Case) -> Path:
    """Write a case: afterwards the directory holds it, or what it held before.

    Raises:
        ArtefactError: The disk refuses, or the program has no form as data.
    """
    tensors = case.program.tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    keep = size <= WEIGHTS_LIMIT_BYTES if reproducer.weights is None else reproducer.weights
    meta = any(tensor.is_meta for tensor in tensors.values())
    keep = keep and not meta
    about = {
        "recipe": to_text([case.pass_]),
        "plan": case.plan.to_json() if case.plan else None,
        "seed": case.seed,
        "verify_each": case.verify_each,
        "error": list(case.error),
        "certified": len(case.inputs),
        "meta": meta,
    }
    with container.Writer(reproducer.folder) as writer:
        writer.add(CASE, [dumps(about)])
        writer.add(GRAPH, [dumps(to_json(case.program))])
        if keep:
            writer.add(WEIGHTS, weights.chunks(tensors))
            writer.add(INPUTS, weights.chunks(named([*case.inputs, *case.calibration])))
        writer.commit({"kind": KIND, "made_by": case.versions})
    return reproducer.folder


def read(path: str | Path, passes: Sequence[type[Pass[Any, Any]]] = ()) -> Case:
    """Read a case.

    Args:
        path: A directory that `write` made.
        passes: Classes of passes that are not registered.

    Raises:
        ArtefactError: The directory is damaged or holds something else.
        OptionError: The pass is not installed here.
    """
    folder = Path(path)
    manifest, entries = container.read(folder)
    if manifest.get("kind") != KIND:
        raise ArtefactError(f"{folder} holds no crash reproducer.", where=container.MANIFEST)
    try:
        about, graph = (plainjson.read(folder / entries[name].file) for name in (CASE, GRAPH))
        tensors = _tensors(folder, entries, graph, "meta" if about["meta"] else "cpu")
        sets = unnamed(read_tensors(folder / entries[INPUTS].file)) if INPUTS in entries else []
        pass_ = _pass(about["recipe"], passes)
        plan = about["plan"]
        return Case(
            pass_=pass_,
            program=from_json(graph, tensors),
            inputs=sets[: about["certified"]],
            calibration=sets[about["certified"] :],
            plan=None if plan is None else Plan.from_json(plan, type(pass_)),
            seed=int(about["seed"]),
            verify_each=bool(about["verify_each"]),
            error=(str(about["error"][0]), str(about["error"][1])),
            versions=dict(manifest["made_by"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtefactError(f"{folder} is malformed: {error}.", where=str(folder)) from error


def replay(path: str | Path, passes: Sequence[type[Pass[Any, Any]]] = ()) -> Replay:
    """Run a case again and say whether it fails as it did.

    Args:
        path: A directory that a failing compile wrote.
        passes: Classes of passes that are not registered.

    Raises:
        ArtefactError: The directory is damaged or holds something else.
        OptionError: The pass is not installed here.
    """
    from .manager import run_passes

    case = read(path, passes)
    try:
        run_passes(
            case.program,
            [case.pass_],
            case.inputs,
            calibration=case.calibration,
            plans=[case.plan],
            seed=case.seed,
            verify_each=case.verify_each,
        )
    except Exception as error:  # any error is what was asked for
        return Replay(case, error, error_text(error) == case.error)
    return Replay(case, None, False)


def attach(reproducer: Reproducer, case: Case, error: BaseException) -> None:
    """Write a case and tell whoever sees the error; a failure to write is told as well."""
    try:
        write(reproducer, case)
    except BlockwrightError as problem:
        error.add_note(f"no reproducer was written: {problem.one_line()}")
    else:
        error.add_note(
            f"reproducer: {reproducer.folder}; replay it with `blockwright bisect --run"
            f" {reproducer.folder}`"
        )


def _tensors(folder: Path, entries: Any, graph: Any, device: str) -> dict[str, Tensor]:
    if WEIGHTS in entries:
        return read_tensors(folder / entries[WEIGHTS].file)
    return {
        str(name): torch.zeros((), dtype=dtype_from(str(dtype)), device=device).expand(shape)
        for name, dtype, shape in graph["tensors"]
    }


def _pass(recipe: str, passes: Sequence[type[Pass[Any, Any]]]) -> Pass[Any, Any]:
    """Return the pass of a case; classes given by hand come before registered ones."""
    (call,) = read_calls(recipe)
    for kind in passes:
        if kind.name == call.name:
            hints = {name: option.hint for name, option in options_of(kind).items()}
            return kind(**{name: fit(value, hints[name]) for name, value in call.options.items()})
    return build_pass(call.name, call.options)
