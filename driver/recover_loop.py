"""The loop that trains, on `accelerate`: started by `accelerate launch`, on all its processes.

Equal seeds give equal weights, also after a kill: a checkpoint goes on at its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import LoweringError, RecoveryError
from ..ir.program import Program
from ..passes.base import Calibration
from ..passes.shared.recovery import Stage
from .numerics import Inputs
from .recover_options import Recover, Say, Training
from .student import Student, Teacher
from .training_state import TrainingState

JUDGED_SETS = 8  # calibration sets the loss is compared on before and after


@dataclass(frozen=True)
class Loop:
    """The training of one stage.

    Attributes:
        title: Stands before progress and errors.
        options: How to train.
        say: Is told about progress.
    """

    title: str
    options: Recover
    say: Say | None = None

    def run(
        self, old: Program, new: Program, stage: Stage, sets: Calibration
    ) -> tuple[Program, Training]:
        """Train; return the new program and what was done.

        Raises:
            RecoveryError: A loss is not finite, or there is nothing to train on.
            LoweringError: `accelerate` is missing.
        """
        accelerator = _accelerator(new, stage.batch)
        with TemporaryDirectory(prefix="blockwright-") as folder:
            kept = Path(folder) if self.options.features == "disk" else None
            teacher = Teacher(old, stage, kept)
            torch.manual_seed(self.options.seed)
            student = Student(new, stage)
            size = sum(parameter.numel() for parameter in student.parameters())
            before = self._judge(student, teacher, sets)
            steps = self._train(accelerator, student, teacher, stage, sets, before)
            after = self._judge(student, teacher, sets)
        better = after <= before
        tensors = {**new.tensors, **(student.tensors() if better else {})}
        return new.with_(tensors=tensors), Training(stage.name, steps, size, before, after, better)

    def loss(self, old: Program, new: Program, stage: Stage, sets: Calibration) -> float:
        """Return the mean loss of a program as it is."""
        return self._judge(Student(new, stage), Teacher(old, stage), sets)

    def _train(
        self,
        accelerator: Any,
        student: Student,
        teacher: Teacher,
        stage: Stage,
        sets: Calibration,
        before: float,
    ) -> int:
        share = self._share(accelerator, sets)
        steps = self.options.steps or stage.epochs * max(1, share // stage.batch)
        optimizer: Any = torch.optim.AdamW(
            _groups(student, stage, self.options.rate),
            betas=stage.betas,
            weight_decay=stage.weight_decay,
        )
        model, optimizer = accelerator.prepare(student, optimizer)
        about = [self.title, self.options.rate, self.options.seed, steps, before,
                 accelerator.num_processes, stage.batch, stage.rate, stage.rates, stage.betas,
                 stage.weight_decay, stage.warm_up, stage.clip, *next(iter(sets))]  # fmt: skip
        state = TrainingState.at(self.options.checkpoint, about, student, optimizer)
        first = state.restore()
        stream = self._stream(accelerator, sets, share, first * stage.batch)
        for step in range(first, steps):
            torch.manual_seed(self.options.seed + step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * pace(step, steps, stage.warm_up)
            for inputs in islice(stream, stage.batch):
                self._update(accelerator, model, optimizer, stage, teacher, inputs, step)
            if self.say and accelerator.is_main_process:
                self.say(self.title, step + 1, steps)
            if (step + 1) % self.options.every == 0 or step + 1 == steps:
                state.save(step + 1, write=accelerator.is_main_process)
        return steps

    def _update(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        stage: Stage,
        teacher: Teacher,
        inputs: Inputs,
        step: int,
    ) -> None:
        """Add the gradient of one set; the last set of a step moves the weights."""
        with accelerator.accumulate(model), torch.enable_grad():
            wanted, given = teacher(inputs)
            loss = model(inputs, given, wanted)
            self._require_finite(loss, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients and stage.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), stage.clip)
            optimizer.step()
            optimizer.zero_grad()

    def _share(self, accelerator: Any, sets: Calibration) -> int:
        """Return how many calibration sets each process goes through in an epoch."""
        count = sum(1 for _ in sets)
        share: int = count // accelerator.num_processes
        if not share:
            raise RecoveryError(
                f"{self.title} has {count} calibration sets for"
                f" {accelerator.num_processes} processes.",
                remedy="give calibration=... at least one set per process.",
            )
        return share

    def _stream(
        self, accelerator: Any, sets: Calibration, share: int, skip: int
    ) -> Iterator[Inputs]:
        """Yield this process's sets, round and round, from the one after `skip` on."""
        world, rank = accelerator.num_processes, accelerator.process_index
        skip %= share
        while True:
            yield from islice(sets, rank + skip * world, share * world, world)
            skip = 0

    def _judge(self, student: Student, teacher: Teacher, sets: Iterable[Inputs]) -> float:
        """Return the mean loss on the first calibration sets."""
        losses: list[float] = []
        torch.manual_seed(self.options.seed)
        with torch.no_grad():
            for inputs in islice(sets, JUDGED_SETS):
                wanted, given = teacher(inputs)
                loss = student(inputs, given, wanted)
                self._require_finite(loss, 0)
                losses.append(loss.item())
        return sum(losses) / max(1, len(losses))

    def _require_finite(self, loss: Tensor, step: int) -> None:
        if not bool(loss.isfinite()):
            raise RecoveryError(
                f"{self.title}: the loss is {loss.item()} at step {step}.",
                remedy="lower the rate (recover=Recover(rate=0.1)), or look for NaN in the model.",
            )


def pace(step: int, steps: int, warm_up: float) -> float:
    """Return the learning rate at a step as a fraction of the largest one.

    It grows over the first steps, `warm_up` of them all, and falls along half a cosine.
    """
    rising = round(warm_up * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _groups(student: Student, stage: Stage, factor: float) -> list[dict[str, Any]]:
    """Return the parameters by learning rate, the largest they get as `peak`."""
    by_rate: dict[float, list[Tensor]] = {}
    for name, parameter in student.trained.named_parameters():
        local = name.partition(".")[2]
        rate = next((r for glob, r in stage.rates.items() if fnmatchcase(local, glob)), stage.rate)
        by_rate.setdefault(rate * factor, []).append(parameter)
    return [{"params": parameters, "peak": rate} for rate, parameters in by_rate.items()]


def _accelerator(program: Program, batch: int) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise LoweringError(
            "training needs the package `accelerate`.",
            remedy='install it: pip install "blockwright[train]", or compile with recover=False.',
        ) from error
    devices = {tensor.device.type for tensor in program.tensors.values()}
    return Accelerator(cpu=devices <= {"cpu"}, gradient_accumulation_steps=batch)
