"""The loop that trains every toy: AdamW, warm-up and cosine, clipped gradients, one seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Generator, Tensor, nn

from .toy import AnyModel, Task

Loss = Callable[[nn.Module, Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a toy is trained.

    Attributes:
        steps: Updates of the weights.
        batch: Examples per update.
        rate: Largest learning rate, reached after `warm_up` of the steps.
        warm_up: Fraction of the steps in which the rate grows from zero. It then falls to zero
            along half a cosine.
        weight_decay: As in AdamW.
        clip: Largest norm of all gradients together.
        seed: Draws the first weights and every batch.

    Source: Loshchilov and Hutter, 2019, arXiv:1711.05101 (AdamW); 2017, arXiv:1608.03983 (cosine).
    """

    steps: int
    batch: int
    rate: float
    warm_up: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


def train(build: Callable[[], AnyModel], loss: Loss, plan: Plan, title: str) -> AnyModel:
    """Build a model and train it.

    The same plan gives the same weights, bit for bit, on one machine with one number of threads.
    The global random state is left as it was.

    Args:
        build: Returns the untrained model; draws its weights from the global random state.
        loss: Loss of one batch, which it draws with the generator it is given.
        plan: How long and how fast.
        title: Stands before the progress bar, which is shown on a terminal only.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = build().train()
    generator = torch.Generator().manual_seed(plan.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.rate,
        betas=(0.9, 0.99),
        weight_decay=plan.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, plan))
    console = Console(stderr=True)
    quiet = not sys.stderr.isatty()
    for _ in track(range(plan.steps), title, console=console, disable=quiet, transient=True):
        optimizer.zero_grad()
        loss(model, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        schedule.step()
    return model.eval()


def task_loss(task: Task, batch: int) -> Loss:
    """Return the loss of one random batch of a task."""

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        inputs, target = task.draw(batch, generator)
        return task.loss(model(*inputs), target).mean()

    return loss


def pace(step: int, plan: Plan) -> float:
    """Return the learning rate at a step as a fraction of the largest one."""
    rising = max(1, round(plan.warm_up * plan.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, plan.steps - rising)))
