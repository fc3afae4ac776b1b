"""How much blocks matter, told by what the model computes with and without them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...ir.errors import OptionError
from ...ir.program import Program
from ...ir.recognize.stack import Stack
from ...ir.taps import tapped
from ..base import Calibration
from .bypass import cannot_bypass


def block_influence(program: Program, calibration: Calibration) -> dict[str, float]:
    """Return 1 - cos(before, after) of every block, the mean over tokens, streams and inputs.

    Source: Men et al., ShortGPT, 2024, arXiv:2403.03853, section 3.1 (block influence).

    Returns:
        Influence by label, in execution order: 0 for a block that turns no vector.

    Raises:
        OptionError: There are no calibration inputs, or activations are not finite.
    """
    stacks = program.stacks()
    if not stacks:
        return {}
    module = tapped(program, [p for stack in stacks for cut in stack.cuts for p in cut if p])

    def measured(inputs: Sequence[Tensor]) -> Tensor:
        values = iter(module(*inputs))
        found: list[Tensor] = []
        for stack in stacks:
            cuts = [[next(values) if place else None for place in cut] for cut in stack.cuts]
            found += [turned(a, b) for a, b in itertools.pairwise(cuts)]
        return torch.stack(found)

    means = mean_over(calibration, measured)
    labels = [block.label for stack in stacks for block in stack.blocks]
    return dict(zip(labels, means.tolist(), strict=True))


def macro_influence(program: Program, stack: Stack, calibration: Calibration) -> dict[str, float]:
    """Return 1 - cos(end, end without the block) of every block of a stack that can be left out.

    The end is the stream after the last block, before any norm. What comes before a block is
    computed once, so this takes about half as many block calls as blocks squared.

    Source: Pei et al., FuseGPT, 2024, arXiv:2411.14507, equation of macro influence.

    Args:
        program: What the stack is in.
        stack: Blocks that all streams pass.
        calibration: Flat inputs.

    Raises:
        OptionError: There are no calibration inputs, or activations are not finite.
    """
    cuts = [[place for place in cut if place is not None] for cut in stack.cuts]
    free = [index for index, block in enumerate(stack.blocks) if cannot_bypass(block) is None]
    if not free:
        return {}
    starts = tapped(program, [place for index in free for place in cuts[index]])
    whole = tapped(program, cuts[-1])
    rests = [tapped(program, cuts[-1], cuts[index + 1]) for index in free]

    def measured(inputs: Sequence[Tensor]) -> Tensor:
        values, end = iter(starts(*inputs)), whole(*inputs)
        at = [[next(values) for _ in cuts[index]] for index in free]
        found = [rest(*inputs, *given) for rest, given in zip(rests, at, strict=True)]
        return torch.stack([turned(without, end) for without in found])

    means = mean_over(calibration, measured)
    return {stack.blocks[i].label: mean for i, mean in zip(free, means.tolist(), strict=True)}


def mean_over(
    calibration: Calibration, measured: Callable[[Sequence[Tensor]], Tensor]
) -> Float[Tensor, " numbers"]:
    """Return the mean over calibration inputs of numbers measured on each.

    Raises:
        OptionError: There are no inputs, or a number is not finite.
    """
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for inputs in calibration:
            total, count = total + measured(inputs).double(), count + 1
    if not count:
        raise needs_calibration("influence")
    if not bool(total.isfinite().all()):
        raise OptionError(
            "the model gives NaN or infinity on the calibration inputs.",
            remedy="leave out the batch that does, or repair the model.",
        )
    return total / count


def turned(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> Tensor:
    """Return 1 - cos of values that are there before and after, the mean over tokens and streams.

    A stream that ends in a block counts in no block after it.
    """
    both = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    cosines = [F.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in both]
    return 1 - torch.stack(cosines).mean()


def needs_calibration(owner: str) -> OptionError:
    """Return the error of a method that has nothing to measure on."""
    return OptionError(
        f"{owner} goes by what is measured on calibration inputs, and there are none.",
        remedy="give calibration=..., or name the blocks.",
    )


@dataclass(frozen=True)
class Drop:
    """Why a block or a sublayer is dropped.

    Attributes:
        influence: How far it turns its streams, from 0 up; None when nobody measured.
    """

    influence: float | None = None


def least_first(labels: Sequence[str], influence: Mapping[str, float], seed: int) -> list[str]:
    """Return labels by their influence, the least first; in random order where none is known."""
    if influence:
        return sorted(labels, key=influence.__getitem__)
    return random.Random(seed).sample(labels, len(labels))


def require_fraction(owner: str, keep_ratio: float, *, of: str) -> None:
    """Refuse a fraction that keeps nothing or more than there is.

    Raises:
        OptionError: It is not above 0 and at most 1.
    """
    if not 0 < keep_ratio <= 1:
        raise OptionError(
            f"{owner}: keep_ratio={keep_ratio} is no fraction of {of} to keep.",
            remedy="use more than 0 and at most 1.",
        )
