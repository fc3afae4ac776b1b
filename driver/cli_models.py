"""The MODEL argument of the command line, and everything that goes with opening one."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..backends.artefact import load
from ..ir.capture import capture, load_directory, resolve_inputs
from ..ir.errors import CaptureError, OptionError
from ..ir.program import Program
from .cli_inputs import (
    dynamic_shapes,
    make_inputs,
    parse_dynamic,
    parse_input,
    vocabulary,
)
from .zoo import PRESETS, Preset, find_preset, near_presets

FORMS = "give a Hugging Face directory, file.py:factory, package.module:factory, or an artefact."
_DIM = re.compile(r"^ *(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)$", re.MULTILINE)
_FIXED = re.compile(r"^ *(\w+) = (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class InputOptions:
    """What the command line says about inputs; see `cli_inputs` for the grammar.

    Attributes:
        inputs: Texts of `--input`.
        dynamic: Texts of `--dynamic`.
        vocab: Limit of integers; None to ask the model.
        seed: Seed of random values.
    """

    inputs: Sequence[str] = ()
    dynamic: Sequence[str] = ()
    vocab: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Opened:
    """A model with its example call.

    Attributes:
        model: The module, or the program of a saved engine or preset.
        args: Positional arguments.
        kwargs: Keyword arguments.
        dynamic_shapes: As `torch.export.export` takes them.
    """

    model: nn.Module | Program
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: dict[str, Any] | None = None

    @property
    def example_inputs(self) -> Any:
        """The example call as `compile` and `capture` take it; None for a saved engine's own."""
        return self.args or dict(self.kwargs) or None


def open_model(text: str, options: InputOptions, *, weights: bool = True) -> Opened:
    """Load a model and make its example inputs; a saved engine has its own.

    Args:
        text: The MODEL argument. What exists as a path is that, not a preset of the same name.
        options: What is said about inputs.
        weights: Whether a preset needs them. They are random then.

    Raises:
        OptionError: The text names no model, or the inputs are malformed.
        CaptureError: The directory does not load, or there are no example inputs.
    """
    if is_artefact(text):
        return Opened(load(Path(text), backend="eager").program)
    preset = None if Path(text).exists() else find_preset(text)
    if preset is not None:
        return _open_preset(preset, options, weights)
    return _with_inputs(load_model(text), text, options)


def program_of(opened: Opened) -> Program:
    """Return the program of an opened model, capturing it if need be."""
    if isinstance(opened.model, Program):
        return opened.model
    with range_advice():
        return capture(opened.model, opened.example_inputs, dynamic_shapes=opened.dynamic_shapes)


def open_program(text: str, options: InputOptions) -> Program:
    """Return the program of an artefact, or capture a model; a preset without weights."""
    return program_of(open_model(text, options, weights=False))


def _open_preset(preset: Preset, options: InputOptions, weights: bool) -> Opened:
    """Capture a preset, and note what its weights and its example inputs are."""
    model = preset.draw(options.seed) if weights else preset.sketch()
    opened = _with_inputs(model, preset.name, options, preset.example_inputs(model))
    if not weights:
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda value: value.to("meta"), (opened.args, dict(opened.kwargs))
        )
        opened = replace(opened, args=args, kwargs=kwargs)
    kind = f"random weights, seed {options.seed}" if weights else "shapes only, no weights"
    sizes = ", ".join(f"{name}={size}" for name, size in preset.sizes.items())
    note = f"{preset.name}: {kind}" + ("." if options.inputs else f"; example inputs at {sizes}.")
    program = program_of(opened)
    return replace(opened, model=program.with_(notes=(*program.notes, note)))


def _with_inputs(
    model: nn.Module, text: str, options: InputOptions, offered: tuple[Tensor, ...] | None = None
) -> Opened:
    """Make example inputs as the options say, or take those a model or preset offers."""
    specs = [parse_input(spec) for spec in options.inputs]
    dynamic = parse_dynamic(options.dynamic)
    given: Any = offered
    if specs:
        given = make_inputs(specs, options.vocab or vocabulary(model), options.seed)
    try:
        args, kwargs = resolve_inputs(model, given)
    except CaptureError as error:
        remedy = "describe them: --input 'x=float32[2,16]', once per argument."
        raise CaptureError(error.what, where=text, remedy=remedy) from error
    names = list(inspect.signature(model.forward).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    unknown = [spec.name for spec in specs if spec.name not in names]
    if unknown and not _takes_any(model):
        raise OptionError(
            f"the model has no argument {unknown[0]!r}.", remedy=f"use {', '.join(names)}."
        )
    return Opened(model, args, kwargs, dynamic_shapes(dynamic, specs, named))


@contextlib.contextmanager
def range_advice() -> Iterator[None]:
    """Say in the words of `--dynamic` what `torch.export` found out about dynamic sizes.

    Raises:
        CaptureError: As raised inside, with better advice where there is some.
    """
    try:
        yield
    except CaptureError as error:
        suggested = str(error.__cause__).partition("Suggested fixes:")[2]
        limits = {name: (low or "0", high) for name, low, high in _DIM.findall(suggested)}
        fixed = dict(_FIXED.findall(suggested))
        if not limits and not fixed:
            raise
        advice = []
        if limits:
            ranges = ",".join(f"{name}={low}..{high}" for name, (low, high) in limits.items())
            advice.append(f"limit them: --dynamic {ranges}")
        advice += [f"fix {name} at {size}, or give another example" for name, size in fixed.items()]
        raise CaptureError(
            f"the model does not allow every size of {', '.join([*limits, *fixed])}.",
            remedy="; ".join(advice) + ".",
        ) from error


def is_artefact(text: str) -> bool:
    """Whether a path is a saved engine: a folder or zip with a manifest."""
    path = Path(text)
    if path.is_dir():
        return (path / "manifest.json").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def load_model(text: str) -> nn.Module:
    """Return the module a MODEL argument names.

    Raises:
        OptionError: It names none.
        CaptureError: The directory does not load.
    """
    path = Path(text)
    if path.is_dir():
        return load_directory(path)
    source, _, name = text.rpartition(":")
    if not source or path.exists():
        raise OptionError(f"{text!r} is not a model.", remedy=_advice(text))
    found = _import(source)
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{source} has no {name!r}.", remedy=FORMS)
        found = getattr(found, part)
    model = found
    if not isinstance(model, nn.Module):
        if not callable(found) or _needs_arguments(found):
            raise OptionError(
                f"{text} is not a module and cannot be called without arguments.",
                remedy="name a function that returns the model: def tiny(): return Model(dim=8).",
            )
        model = found()
    if not isinstance(model, nn.Module):
        raise OptionError(f"{text} gave a value of type {type(model).__name__}, no torch module.")
    return model.eval()


def _advice(text: str) -> str:
    """Say which presets are spelled alike, or else what a model can be."""
    near = near_presets(text)
    if near:
        return f"did you mean {' or '.join(near)}?"
    presets = ", ".join(preset.name for preset in PRESETS)
    return f"{FORMS.removesuffix(', or an artefact.')}, an artefact, or a preset: {presets}."


def _takes_any(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return True
    return False


def _import(source: str) -> Any:
    """Import a file by path, or a module as `python -m` in this folder would find it."""
    if source.endswith(".py"):
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise OptionError(f"there is no file {source}.", remedy=FORMS)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not source.startswith(error.name):
            raise
        raise OptionError(f"there is no module {source!r}.", remedy=FORMS) from error
