"""Check a graph made by someone else against the captured model, at several sizes.

    old      the captured model in fp32          exact    the same in fp64
    new      the foreign graph, wherever it runs

The foreign graph may be a small multiple as far from fp64 as the model is; see `numerics`. Where
it is further, or fails while the model runs, the first node at fault is named; see `locate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.capture import ExampleInputs, Model, capture
from ..ir.errors import BlockwrightError, LoweringError, OptionError
from ..ir.plain import plain
from ..ir.program import Program
from ..ir.run import run
from .calibration import example_set
from .certify import output_names
from .foreign import Foreign, Port, Trace, call_arguments, foreign_of
from .foreign_inputs import Sizes, inputs_at, place_inputs, sizes_to_try, symbols_of
from .locate import Suspect, locate, suspect_of_error
from .numerics import OutputError, Verdict, judge

SPREAD = 1  # seed of the sizes that are not the example's, added to the caller's


@dataclass(frozen=True)
class Shape:
    """What became of the comparison at one set of sizes.

    Attributes:
        sizes: Of the named dimensions.
        outputs: Error of each output; empty when the graph did not run.
        wrong: Outputs that are further from fp64 than rounding explains, of another shape, or
            infinite.
        failure: Why the graph did not run.
    """

    sizes: Mapping[str, int]
    outputs: Mapping[str, OutputError]
    wrong: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the graph computes what the model does."""
        return not self.wrong and self.failure is None


@dataclass(frozen=True)
class ForeignVerification:
    """What came of checking a foreign graph.

    Attributes:
        subject: What was checked.
        shapes: One entry per set of sizes.
        suspects: First node that goes wrong, for wrong numbers and for failing to run.
        notes: What was not checked, and why.
    """

    subject: str
    shapes: tuple[Shape, ...]
    suspects: tuple[Suspect, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the graph is right at every size it was compared at."""
        return bool(self.shapes) and all(shape.ok for shape in self.shapes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ok": self.ok, **plain(self)}


def verify(
    model: Model | Program,
    other: Any,
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Any = None,
    sizes: Sequence[Sizes] | None = None,
    against: str | Path | None = None,
    seed: int = 0,
    trust: bool = False,
) -> ForeignVerification:
    """Compare something made by others with a model.

    Args:
        model: What is right: a module, an exported or captured program, a Hugging Face directory.
        other: What is judged: the path of an ONNX file or saved engine, an `onnx.ModelProto`, an
            `ExportedProgram`, an engine, or anything that is called like the model.
        example_inputs: As for `capture`. Other sizes are made from them.
        dynamic_shapes: As for `capture`; a module is captured again at sizes this leaves out.
        sizes: Sizes to compare at, by the names the foreign graph has for its dimensions. By
            default the example's, and each dimension varied.
        against: The ONNX file before it was rewritten; helps to name the node.
        seed: Of random inputs.
        trust: Whether a `.pt2` file may be read, which can run code of whoever made it.

    Raises:
        OptionError: The two do not take the same inputs, or there is no such file.
        CaptureError: The model cannot be captured.
    """
    source = _Source(model, example_inputs, dynamic_shapes)
    foreign = foreign_of(other, source.program, trust=trust)
    original = foreign_of(against, source.program) if against is not None else None
    return _Check(source, foreign, original, seed).all(sizes)


class _Source:
    """The model, captured for whatever sizes are asked for."""

    def __init__(self, model: Model | Program, example: ExampleInputs, dynamic: Any) -> None:
        self.model = model
        self.program = (
            model if isinstance(model, Program) else capture(model, example, dynamic_shapes=dynamic)
        )
        flat = example_set(self.program, model, example)
        held = {slot.input for slot in self.program.state}
        places = [n.name for n in self.program.main.nodes if n.op == "placeholder"]
        self.flat = [value for name, value in zip(places, flat, strict=True) if name not in held]
        self.names = [_input_name(name) for name in self._paths()]

    def at(self, flat: Sequence[Tensor]) -> Program:
        """Return the program for these inputs.

        Raises:
            BlockwrightError: The model does not take them.
        """
        args, kwargs = call_arguments(self.program.signature, flat)
        try:
            self.program.signature.bind(args, kwargs)
        except OptionError:
            if not isinstance(self.model, torch.nn.Module):
                raise
            return capture(self.model, kwargs or tuple(args))
        return self.program

    def _paths(self) -> list[str]:
        signature = self.program.signature
        return [
            path
            for argument in signature.arguments
            for path, leaf in zip(
                argument.structure.paths(argument.name), argument.leaves, strict=True
            )
            if not isinstance(leaf, int | float | bool | str | None)
        ]


class _Check:
    """One foreign graph beside one model."""

    def __init__(
        self, source: _Source, foreign: Foreign, original: Foreign | None, seed: int
    ) -> None:
        self.source, self.foreign, self.original, self.seed = source, foreign, original, seed
        self.ports = foreign.inputs or _static(source)
        self.places = place_inputs(self.ports, source.names, source.flat)
        self.example = self._theirs(source.flat)
        self.symbols = symbols_of(self.ports, self.example)
        self.notes: list[str] = []

    def all(self, wanted: Sequence[Sizes] | None) -> ForeignVerification:
        """Compare at all sizes, and name what goes wrong first."""
        shapes: list[Shape] = []
        suspects: dict[str, Suspect] = {}
        for sizes in wanted or sizes_to_try(self.ports, self.symbols, self._windows()):
            complete = {**self.symbols, **sizes}
            flat = self._ours(complete)
            try:
                program = self.source.at(flat)
                shape = self._shape(program, flat, complete, suspects)
            except BlockwrightError as error:
                self.notes.append(f"not compared at {_words(complete)}: {error.what}")
                continue
            shapes.append(shape)
        if not shapes:
            raise OptionError(
                "the model runs at none of the sizes.", remedy=self.notes[0] if self.notes else None
            )
        notes = tuple(dict.fromkeys(self.notes))
        return ForeignVerification(
            self.foreign.label, tuple(shapes), tuple(suspects.values()), notes
        )

    def _shape(
        self, program: Program, flat: list[Tensor], sizes: Sizes, suspects: dict[str, Suspect]
    ) -> Shape:
        theirs = self._theirs(flat)
        old = self._model(program, flat, None)
        try:
            new = self.foreign.run(theirs)
        except LoweringError as error:
            suspects.setdefault("failure", suspect_of_error(error, self._steps()))
            return Shape(sizes, {}, failure=error.what)
        exact = self._model(program, flat, torch.float64)
        reduced = {v.dtype for v in new if v.is_floating_point()} & {torch.float16, torch.bfloat16}
        if reduced:
            old = self._model(program, flat, reduced.pop())
        verdicts, wrong = self._judge(program, old, new, exact)
        if wrong and "numbers" not in suspects:
            found = self._locate(program, flat, theirs)
            if found is not None:
                suspects["numbers"] = found
        return Shape(sizes, {name: v.error for name, v in verdicts.items()}, wrong)

    def _judge(
        self, program: Program, old: list[Tensor], new: list[Tensor], exact: list[Tensor]
    ) -> tuple[dict[str, Verdict], tuple[str, ...]]:
        """Compare outputs by place; those of another shape or type are wrong."""
        names = output_names(program)
        if len(new) != len(names):
            self.notes.append(f"the graph has {len(new)} outputs, the model {len(names)};"
                              " the first of both were compared.")  # fmt: skip
        verdicts: dict[str, Verdict] = {}
        wrong: list[str] = []
        for name, before, after, truth in zip(names, old, new, exact, strict=False):
            if before.shape != after.shape:
                wrong.append(name)
                self.notes.append(f"{name} is {list(after.shape)}, not {list(before.shape)}.")
                continue
            verdict = judge([[before]], [[after.to(before.dtype)]], [[truth]], [name])[name]
            verdicts[name] = verdict
            if not (verdict.rounding and verdict.finite):
                wrong.append(name)
        return verdicts, tuple(wrong)

    def _locate(self, program: Program, flat: list[Tensor], theirs: list[Tensor]) -> Suspect | None:
        arranged = program.arranged(flat)
        trace = self.foreign.trace(theirs)
        if trace is None:
            self.notes.append(f"{self.foreign.label} shows no values, so no node can be named.")
            return None
        found = locate(program, arranged, trace, self._before(theirs))
        if found is None:
            self.notes.append(
                "run as it is written, every value of the graph leads to one of the model: the"
                " fault is in what the runtime makes of it, or in the order of an output."
            )
        return found

    def _before(self, theirs: list[Tensor]) -> Trace | None:
        return self.original.trace(theirs) if self.original else None

    def _steps(self) -> Mapping[str, str]:
        return getattr(self.foreign, "operators", {})

    def _model(
        self, program: Program, flat: Sequence[Tensor], dtype: torch.dtype | None
    ) -> list[Tensor]:
        try:
            return run(program, program.arranged(flat), dtype=dtype)
        except Exception as error:  # whatever torch raises at sizes a model does not support
            raise OptionError(f"the model does not run: {str(error).splitlines()[0]}") from error

    def _ours(self, sizes: Sizes) -> list[Tensor]:
        """Return inputs of the model at some sizes."""
        flat = list(self.source.flat)
        made = inputs_at(self.ports, self.example, self.symbols, sizes, self.seed + SPREAD)
        for place, value in zip(self.places, made, strict=True):
            flat[place] = value.to(flat[place].dtype)
        return flat

    def _theirs(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return inputs of the foreign graph, in its order and types."""
        return [flat[place].to(port.dtype) for port, place in
                zip(self.ports, self.places, strict=True)]  # fmt: skip

    def _windows(self) -> list[int]:
        return [a.window for a in self.source.program.attentions() if a.window is not None]


def _static(source: _Source) -> tuple[Port, ...]:
    """Return the inputs of the model as ports, for what declares none of its own."""
    specs = source.program.signature.inputs
    return tuple(Port(name, s.dtype, s.shape) for name, s in zip(source.names, specs, strict=True))


def _input_name(path: str) -> str:
    return path.replace(".", "_")


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the example's sizes"
