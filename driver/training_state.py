"""The state of a training on disk: parameters, optimizer and step, as data.

A file belongs to one training: its name hashes what the training begins with. Random numbers need
no state, every step seeds its own, and learning rates follow from the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..backends import disk, weights
from ..ir.errors import BlockwrightError
from .student import Student, fingerprint


@dataclass
class TrainingState:
    """Where a training is kept.

    Attributes:
        path: The file; None keeps nothing.
        student: What is trained.
        optimizer: Its optimizer.
    """

    path: Path | None
    student: Student
    optimizer: Any

    @classmethod
    def at(
        cls, folder: str | Path | None, about: Sequence[object], student: Student, optimizer: Any
    ) -> Self:
        """Return the state of a training in a folder, which is made if need be.

        Args:
            folder: Where; None keeps nothing.
            about: What the training depends on beside the student: numbers, words, tensors.
            student: At its beginning.
            optimizer: Of the student.

        Raises:
            ArtefactError: The folder cannot be made.
        """
        if folder is None:
            return cls(None, student, optimizer)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk.cannot_write(Path(folder), error) from error
        begin = fingerprint([*about, *student.names, *map(_whole, student.parameters())])
        return cls(Path(folder) / f"{begin[:16]}.safetensors", student, optimizer)

    def restore(self) -> int:
        """Go on where a killed training was; return the step. A damaged file is ignored."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            known = weights.read(self.path)
            step = int(known.pop("step"))
        except (BlockwrightError, OSError, KeyError, ValueError):
            return 0
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(_dealt(known[f"parameter.{name}"], parameter))
        self.optimizer.load_state_dict(self._nested(known))
        return step

    def save(self, step: int, *, write: bool = True) -> None:
        """Keep the state after a step.

        Args:
            step: Steps done.
            write: Whether this process writes it; where weights are dealt out to several, all of
                them are to call this.

        Raises:
            ArtefactError: The disk refuses.
        """
        if self.path is None:
            return
        tensors = {"step": torch.tensor(step)}
        for name, parameter in self.student.named_parameters():
            tensors[f"parameter.{name}"] = _whole(parameter).contiguous()
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": _whole(v) for key, v in values.items()}
        if write:
            disk.replace_file(self.path, weights.chunks(tensors))

    def _nested(self, flat: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state of the optimizer; groups and rates are those it has."""
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in flat.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                moment = _dealt(value, parameters[int(index)]) if value.dim() else value
                state.setdefault(int(index), {})[key] = moment
        return {"state": state, "param_groups": groups}


def _whole(tensor: Any) -> Tensor:
    """Return a tensor of which each process may hold a part, as under FSDP2."""
    found: Tensor = tensor.detach().full_tensor() if _is_dealt_out(tensor) else tensor.detach()
    return found


def _dealt(whole: Tensor, like: Any) -> Tensor:
    """Return the part of a tensor that this process holds, as of another one."""
    if not _is_dealt_out(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _is_dealt_out(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor; a question that imports nothing."""
    return hasattr(tensor, "full_tensor")
