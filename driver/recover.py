"""Train what a pass has changed, the program before it as teacher.

A pass declares stages (`passes.shared.recovery`); `driver.recover_loop` carries one out, here they
follow each other. Only the weights a stage names move, graphs stay. A training that ends worse than
it began is thrown away. Weights that were trained before can be taken from a file instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backends import weights
from ..backends.artefact import load
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import Calibration, Pass, Plan
from ..passes.shared.least_squares import residual_fits
from ..passes.shared.recovery import Stage
from .recover_loop import Loop
from .recover_options import Recover, Say, Training

__all__ = ["Recover", "Say", "Training", "calibrated", "recover", "require_taken"]


def recover(
    old: Program,
    new: Program,
    stages: Sequence[Stage],
    calibration: Calibration,
    options: Recover,
    *,
    by: str = "recover",
    say: Say | None = None,
) -> tuple[Program, tuple[Training, ...]]:
    """Carry out stages one after the other.

    Args:
        old: The teacher.
        new: The student; it is not changed.
        stages: What is trained.
        calibration: Flat inputs, the same as often as one asks.
        options: How.
        by: Name of the pass, for progress and errors.
        say: Called with (what runs, steps done, steps in all).

    Returns:
        A program of the same graphs with trained weights, and what each stage did. What a file of
        weights lacks is in `Training.missing`: a later round may yet remove it; `require_taken`.

    Raises:
        RecoveryError: A loss is not finite, or there is nothing to train on.
        OptionError: `options.weights` has a weight in another shape.
        LoweringError: `accelerate` is missing.
    """
    done: list[Training] = []
    for stage in stages:
        loop = Loop(f"{by}: {stage.name}", options, say)
        if options.weights is None:
            new = _fitted(old, new, stage, calibration)
            new, training = loop.run(old, new, stage, calibration)
        else:
            new, missing = _taken(new, stage, Path(options.weights))
            loss = loop.loss(old, new, stage, calibration)
            training = Training(stage.name, 0, 0, loss, loss, missing=missing)
        done.append(training)
    return new, tuple(done)


def calibrated(
    pass_: Pass[Any, Any], old: Program, new: Program, plan: Plan[Any], calibration: Calibration
) -> Program:
    """Return the new program with the weights that a pass finds on the calibration."""
    found = pass_.calibrate(old, new, plan, calibration) if new is not old else {}
    for name, tensor in found.items():
        own = new.require(name)
        assert (tensor.shape, tensor.dtype) == (own.shape, own.dtype), name
    moved = {name: tensor.to(new.require(name).device) for name, tensor in found.items()}
    return new.with_(tensors={**new.tensors, **moved}) if moved else new


def _fitted(old: Program, new: Program, stage: Stage, calibration: Calibration) -> Program:
    """Return the program with the layers of a stage at their least squares."""
    ends = [(fit.before, fit.after) for fit in stage.fits]
    tensors = dict(new.tensors)
    for fit, sums in zip(stage.fits, residual_fits(old, ends, calibration), strict=True):
        for name, value in zip((fit.weight, fit.bias), sums.solve(), strict=True):
            tensors[name] = value.to(new.require(name))
    return new.with_(tensors=tensors) if stage.fits else new


def require_taken(new: Program, trained: Iterable[Training], options: Recover) -> None:
    """Refuse a file of weights that lacks some which the program still has.

    Raises:
        OptionError: Names the first.
    """
    for training in trained:
        for name in training.missing:
            if new.aliases.get(name, name) in new.tensors:
                raise _unfit(new.require(name), name, training.stage, Path(str(options.weights)))


def _taken(program: Program, stage: Stage, path: Path) -> tuple[Program, tuple[str, ...]]:
    """Return the program with the weights of a stage taken from a file, and what the file lacks."""
    known = weights.read(path) if path.suffix == ".safetensors" else load(path).program.tensors
    given: dict[str, Tensor] = {}
    missing: list[str] = []
    for name in (program.aliases.get(name, name) for name in stage.weights):
        own, found = program.require(name), known.get(name)
        if found is None:
            missing.append(name)
        elif (found.shape, found.dtype) != (own.shape, own.dtype):
            raise _unfit(own, name, stage.name, path, found)
        else:
            given[name] = found.to(own.device)
    return program.with_(tensors={**program.tensors, **given}), tuple(missing)


def _unfit(
    own: Tensor, name: str, stage: str, path: Path, found: Tensor | None = None
) -> OptionError:
    have = "lacks it" if found is None else f"has {list(found.shape)} {found.dtype}"
    return OptionError(
        f"{stage} trains {name!r}, {list(own.shape)} {own.dtype}; {path.name} {have}.",
        where=str(path),
        remedy="take the engine that the same pass has made of the same model.",
    )
