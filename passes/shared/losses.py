"""Losses that methods are trained back with: how far a student is from its teacher.

Functions named after what they compare take both programs and return a `Loss`; the plain functions
under them take tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...ir.program import Program
from ...ir.recognize.place import Place
from ...ir.taps import outputs_of
from .recovery import Loss, Values

Distance = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-12


def pairs(
    student: Sequence[Place], teacher: Sequence[Place], distance: Distance = F.mse_loss
) -> Loss:
    """Return the sum of distances between values of the student and those of the teacher."""

    def measure(ours: Values, theirs: Values) -> Tensor:
        found = [distance(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(found).sum()

    return Loss(tuple(student), tuple(teacher), measure)


def output_mse(old: Program, new: Program) -> Loss:
    """Return the mean squared error of the outputs that are floating-point."""
    return pairs(_floating(new), _floating(old))


def output_kl(old: Program, new: Program, temperature: float = 1.0) -> Loss:
    """Return the divergence of the outputs, read as logits along their last axis.

    Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, section 2.
    """

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        return soft_kl(ours, theirs, temperature)

    return pairs(_floating(new), _floating(old), distance)


def balanced_features(output: Loss, student: Sequence[Place], teacher: Sequence[Place]) -> Loss:
    """Return an output loss plus the errors of features, each weighed to matter as much.

    w_l = |L_out| / |L_l| * mean_j ||f_j|| / ||f_l||, computed anew in every step, without gradient.

    Source: Zheng et al., Dense2MoE, 2025, arXiv:2510.09094.
    Differs: an error below a thousandth of the feature's square counts as that much, or what is
        right already would outweigh everything else.
    """
    count, known = len(output.student), len(output.teacher)

    def measure(ours: Values, theirs: Values) -> Tensor:
        whole = output.measure(ours[:count], theirs[:known])
        features = list(zip(ours[count:], theirs[known:], strict=True))
        losses = torch.stack([F.mse_loss(a.float(), b.float()) for a, b in features])
        norms = torch.stack([b.float().norm() for _, b in features])
        floors = torch.stack([b.float().square().mean() for _, b in features]) * 1e-3 + TINY
        share = whole.detach() / torch.maximum(losses.detach(), floors)
        return whole + (share * norms.mean() / norms.clamp_min(TINY) * losses).sum()

    return Loss(output.student + tuple(student), output.teacher + tuple(teacher), measure)


def soft_kl(
    ours: Float[Tensor, "*batch classes"],
    theirs: Float[Tensor, "*batch classes"],
    temperature: float = 1.0,
) -> Tensor:
    """Return KL(theirs || ours) per row, times the squared temperature."""
    student = F.log_softmax(ours / temperature, dim=-1)
    teacher = F.log_softmax(theirs / temperature, dim=-1)
    rows = F.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)
    return rows.mean() * temperature**2


def batch_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return KL(theirs || ours) along the batch axis; always 0 for a batch of one.

    Source: the code released with FuseGPT, Pei et al., 2024, arXiv:2411.14507.
    """
    student = F.log_softmax(ours, dim=0)
    return F.kl_div(student, F.softmax(theirs, dim=0), reduction="batchmean")


def direction_mse(ours: Float[Tensor, "*batch dim"], theirs: Float[Tensor, "*batch dim"]) -> Tensor:
    """Return the mean squared distance of vectors scaled to length one.

    Source: Ma et al., PPCL, 2025, arXiv:2511.16156.
    """
    apart = F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)
    return apart.square().sum(dim=-1).mean()


def direction_l1(ours: Float[Tensor, "*batch dim"], theirs: Float[Tensor, "*batch dim"]) -> Tensor:
    """Return the mean L1 distance of vectors scaled to length one."""
    apart = F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)
    return apart.abs().sum(dim=-1).mean()


def balance(probabilities: Float[Tensor, "*batch experts"], chosen: Tensor) -> Tensor:
    """Return n * sum_i f_i P_i of one router: 1 where all experts are used alike, n at worst.

    Args:
        probabilities: Scores of the experts, which sum to one.
        chosen: The experts chosen, [*batch, k].

    Source: Fedus, Zoph and Shazeer, 2022, arXiv:2101.03961, equations 4 to 6.
    """
    experts = probabilities.shape[-1]
    used = F.one_hot(chosen.flatten(), experts).float().mean(dim=0)
    return experts * (used * probabilities.flatten(0, -2).mean(dim=0)).sum()


def _floating(program: Program) -> tuple[Place, ...]:
    return tuple(p for p in outputs_of(program) if p.node.meta["val"].dtype.is_floating_point)
