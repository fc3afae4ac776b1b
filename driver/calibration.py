"""Inputs to certify and calibrate on, as the flat tensors programs take."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..ir.capture import ExampleInputs, resolve_inputs
from ..ir.errors import BlockwrightError, OptionError
from ..ir.program import Program

CERTIFIED_SETS = 4  # input sets a certificate is measured on beside the example
TaskLoss = Callable[[Any, Any], Tensor]  # (outputs as the model returns them, target) -> [batch]
CALIBRATION_LIMIT = 1024  # input sets looked at when a calibration does not end


class CalibrationSets:
    """Calibration inputs as flat tensors: as often as one asks, one set in memory at a time.

    An iterator can be read only once: of one, the first few sets are kept and the rest is left
    unread. Anything that can be iterated again (a list, a `DataLoader`) is streamed every time.
    """

    def __init__(self, program: Program, source: Iterable[Any]) -> None:
        once = iter(source) is source
        self._source = list(islice(source, CERTIFIED_SETS)) if once else source
        self._program = program

    def __iter__(self) -> Iterator[list[Tensor]]:
        for index, item in enumerate(islice(self._source, CALIBRATION_LIMIT)):
            yield self._flat(index, item)

    def __length_hint__(self) -> int:
        told = operator.length_hint(self._source, -1)
        return NotImplemented if told < 0 else min(told, CALIBRATION_LIMIT)

    def _flat(self, index: int, item: Any) -> list[Tensor]:
        args, kwargs = ((), item) if isinstance(item, Mapping) else (_as_tuple(item), {})
        try:
            flat = self._program.arranged(self._program.signature.bind(args, kwargs))
        except BlockwrightError as error:
            raise OptionError(
                error.what, where=f"calibration batch {index}", remedy=error.remedy
            ) from error
        held = {tensor.device for tensor in self._program.tensors.values()}
        if held and any(tensor.device not in held for tensor in flat):
            raise OptionError(
                f"it is on {', '.join(sorted({str(t.device) for t in flat}))}, the model on"
                f" {', '.join(sorted(map(str, held)))}.",
                where=f"calibration batch {index}",
                remedy="move it to the device of the model.",
            )
        if any(t.is_floating_point() and not t.isfinite().all() for t in flat):
            raise OptionError(
                "it holds NaN or infinity.",
                where=f"calibration batch {index}",
                remedy="leave the batch out.",
            )
        return flat


class JudgedSets(CalibrationSets):
    """Calibration inputs that come with targets: pairs of both."""

    def __init__(self, program: Program, source: Iterable[Any], loss: TaskLoss) -> None:
        super().__init__(program, source)
        self._loss = loss

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (flat for flat, _ in self.pairs())

    def pairs(self) -> Iterator[tuple[list[Tensor], Any]]:
        """Yield flat inputs and their target."""
        for index, item in enumerate(islice(self._source, CALIBRATION_LIMIT)):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise OptionError(
                    f"it is a {type(item).__name__}, not a pair (inputs, target).",
                    where=f"calibration batch {index}",
                    remedy="with loss=... every batch comes with what the model should make of it.",
                )
            inputs, target = item
            yield self._flat(index, inputs), target

    def loss(self, outputs: Sequence[Tensor], target: Any) -> Tensor:
        """Return the loss of each sample, [batch].

        Raises:
            OptionError: The loss function gave something else.
        """
        found = self._loss(self._program.signature.pack(outputs), target)
        if not isinstance(found, Tensor) or found.dim() != 1:
            have = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"loss(outputs, target) returned {have}, one number per sample is needed.",
                remedy="leave the mean out: reduction='none', then the mean over all other axes.",
            )
        return found


def example_set(program: Program, model: Any, example_inputs: ExampleInputs) -> list[Tensor]:
    """Return the example call as flat tensors, state included."""
    if isinstance(model, nn.Module):
        args, kwargs = resolve_inputs(model, example_inputs)
    elif isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), {}
    elif example_inputs is not None:
        args, kwargs = tuple(example_inputs), {}
    else:
        return made_up(program)
    return program.arranged(program.signature.bind(args, kwargs))


def calibration_sets(
    program: Program,
    example: list[Tensor],
    source: Iterable[Any] | None,
    loss: TaskLoss | None = None,
) -> tuple[list[list[Tensor]], Iterable[list[Tensor]]]:
    """Return the sets to certify on, and those to calibrate on: the example when none are given.

    Raises:
        OptionError: A calibration was given and is empty, or a batch does not fit the model.
    """
    if source is None:
        return [example], [example]
    sets = JudgedSets(program, source, loss) if loss else CalibrationSets(program, source)
    first = list(islice(sets, CERTIFIED_SETS))
    if not first:
        raise OptionError(
            "the calibration holds no inputs.", remedy="give some, or leave calibration out."
        )
    return [example, *first], sets


def made_up(program: Program) -> list[Tensor]:
    """Make valid inputs for a program that came without any: small integers and normal floats."""
    sizes, generator = program.sizes(), torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for spec in program.signature.inputs:
        shape = [sizes.get(d, 2) if isinstance(d, str) else d for d in spec.shape]
        value = torch.randn(shape, generator=generator)
        made.append(value.to(spec.dtype) if spec.dtype.is_floating_point else
                    torch.ones(shape, dtype=spec.dtype))  # fmt: skip
    return program.arranged(made)


def _as_tuple(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, tuple | list) else (item,)
