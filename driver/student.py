"""The program after a pass as something to train, and the one before as its teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import disk, weights
from ..ir.errors import OptionError
from ..ir.flatten import readable
from ..ir.program import Program
from ..ir.taps import tapped
from ..passes.shared.recovery import Stage


class Own(nn.Module):
    """A weight that is trained as it is, in fp32 or more."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        precision = torch.promote_types(tensor.dtype, torch.float32)
        self.value = nn.Parameter(tensor.detach().to(precision, copy=True))
        self.dtype = tensor.dtype

    def forward(self) -> Tensor:
        return self.value.to(self.dtype)


class Student(nn.Module):
    """What a stage trains: its parameters are trainable, all of them.

    Weights that the loss does not depend on stay as they are.

    Args:
        program: The new program.
        stage: What of it is trained, and to what end.

    Raises:
        OptionError: The loss depends on none of the weights.
    """

    def __init__(self, program: Program, stage: Stage) -> None:
        super().__init__()
        self.loss = stage.loss
        feeds = [place for place, _ in stage.feeds]
        # What one student makes may be where the next is fed: the loss must see what was made.
        run = tapped(program, stage.loss.student, feeds, computed=True)
        self._run = (run,)  # in a tuple, so that its frozen weights are not taken for ours
        self._read = {name for name, _ in (*run.named_parameters(), *run.named_buffers())}
        self.held = {readable(program.aliases.get(n, n)): t for n, t in stage.held.items()}
        own = {program.aliases.get(name, name): module for name, module in stage.weights.items()}
        tensors = {name: program.require(name) for name in own}
        self.names = tuple(name for name in own if readable(name) in self._read)
        if not self.names:
            raise OptionError(f"the loss of stage {stage.name!r} depends on none of its weights.")
        given = ((tensors[name], own[name]) for name in self.names)
        self.trained = nn.ModuleList(Own(t) if module is None else module for t, module in given)

    def forward(
        self, inputs: Sequence[Tensor], feeds: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> Tensor:
        (run,) = self._run
        own = {name: tensor for name, tensor in self.held.items() if name in self._read}
        own |= {readable(n): module() for n, module in zip(self.names, self.trained, strict=True)}
        values = torch.func.functional_call(run, own, (*inputs, *feeds))
        return self.loss.measure(values, teacher)

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained weights by name; under FSDP2, all processes are to call it."""
        dealt_out: list[Any] = [part for part in self.modules() if hasattr(part, "unshard")]
        for part in dealt_out:
            part.unshard()
        with torch.no_grad():
            found = zip(self.names, self.trained, strict=True)
            tensors = {name: module().detach().clone() for name, module in found}
        for part in dealt_out:
            part.reshard()
        return tensors


class Teacher:
    """The old program, which gives values to compare with and values to go on from.

    Args:
        program: The old program.
        stage: What asks for them.
        folder: Keeps them, so that each input is looked at once; None computes them each time.
    """

    def __init__(self, program: Program, stage: Stage, folder: Path | None = None) -> None:
        self.asked = len(stage.loss.teacher)
        places = (*stage.loss.teacher, *(place for _, place in stage.feeds))
        self._run = tapped(program, places) if places else None
        self._folder = folder

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the values the loss compares with, and the values to feed."""
        values = self._values(inputs)
        return values[: self.asked], values[self.asked :]

    def _values(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._run is None:
            return ()
        if self._folder is None:
            with torch.no_grad():
                return self._run(*inputs)
        path = self._folder / f"{fingerprint(inputs)}.safetensors"
        if not path.exists():
            with torch.no_grad():
                values = self._run(*inputs)
            named = {str(index): value.contiguous() for index, value in enumerate(values)}
            disk.replace_file(path, weights.chunks(named))
        known = weights.read(path)
        return [known[str(index)].to(inputs[0].device) for index in range(len(known))]


def fingerprint(parts: Iterable[object]) -> str:
    """Hash tensors by type, shape and value, and anything else by how it prints."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{part!r}".encode())
    return digest.hexdigest()
