"""What Dense2MoE says of depth and modulation: FLUX without weights, a mixture on a trained DiT."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.driver.recover_loop import Loop
from blockwright.driver.zoo import find_preset
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.recognize import Modulation, Place
from blockwright.ir.run import run
from blockwright.passes import (
    Canonicalize,
    DenseToMoE,
    DropBlocks,
    MixtureOfBlocks,
    ShareModulation,
)
from blockwright.passes.shared.block_groups import relative_error
from blockwright.passes.shared.influence import block_influence
from blockwright.passes.shared.losses import pairs
from blockwright.passes.shared.recovery import Stage
from blockwright.passes.shared.students import cuts_around
from blockwright.passes.shared.tying import key_of, weight_names
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "dense2moe"
KEPT, WITH_SHARED = 8_317_496_384, 5_145_570_368
STEPS, HELD = 600, 160
GROUPS = ((0, 1), (2, 3))
BEST = (1, 3)  # of the four ways to drop one block of each group, trained like the others


def test_published_activated_parameters_with_shared_modulation(acceptance: Acceptance) -> None:
    preset = find_preset("flux.1-dev")
    assert preset is not None
    model = preset.sketch()
    inputs = tuple(v.to("meta") for v in model.example_inputs(**{**preset.sizes, "words": 64}))
    program, _ = run_passes(capture(model, inputs), [Canonicalize(allow_no_match=True)])
    passes = [ShareModulation(across="model"), DenseToMoE()]
    new, _ = run_passes(program, passes, verify_each=False)
    tables = sum(m.tensor(t).numel() for m in new.regions(Modulation) for t in m.tables)
    kept, _ = run_passes(program, [DenseToMoE()], verify_each=False)
    activated = [p.cost().activated_parameters for p in (kept, new)]
    acceptance(
        METHOD, 6, "flux.1-dev: activated parameters of 1S12E2A with one modulation layer for all"
        f" blocks, {WITH_SHARED:,} (the published 5.15 B), tables of offsets not counted.",
        naive=f"every block's own modulation, {activated[0]:,}",
        figure=f"{activated[1] - tables:,}, and {tables:,} in tables",
        holds=activated[1] - tables == WITH_SHARED,
    )  # fmt: skip
    stored = new.cost().parameters
    acceptance(
        METHOD, 6, "flux.1-dev: parameters in all, with experts and shared modulation (the paper"
        ' says "9 B").',
        naive=f"the dense model, {program.cost().parameters:,}", figure=f"{stored:,}",
        holds=round(stored / 1e9, 1) == 8.7,
    )  # fmt: skip
    assert activated[0] == KEPT
    assert activated[1] - tables == WITH_SHARED
    assert tables == (19 * 12 + 38 * 3) * 3072
    assert round(stored / 1e9, 1) == 8.7


def rows(toy: Toy, count: int, seed: int) -> list[tuple[list[Tensor], Tensor]]:
    """Return training examples one by one, each with its target."""
    batches = toy.judged(-(-count // len(toy.example_inputs[0])), seed)
    every = [
        ([value[i : i + 1] for value in inputs], target[i : i + 1])
        for inputs, target in batches
        for i in range(len(target))
    ]
    return every[:count]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_mixture_beats_dropping_as_many_blocks(toy_dit: Toy, acceptance: Acceptance) -> None:
    program = capture(toy_dit.model, tuple(value[:1] for value in toy_dit.example_inputs))
    sets = [inputs for inputs, _ in rows(toy_dit, 400, seed=0)]
    recover = Recover(steps=STEPS)
    mix = MixtureOfBlocks(groups=GROUPS)
    mixed, (step,) = run_passes(program, [mix], calibration=sets, recover=recover)
    influence = list(block_influence(program, sets).values())
    least = [min(group, key=influence.__getitem__) for group in GROUPS]
    dropped = dropped_and_taught(program, least, sets, recover)
    best = dropped_and_taught(program, BEST, sets, recover)
    held = rows(toy_dit, HELD, seed=1)
    loss = [denoising(toy_dit, p, held) for p in (program, mixed, dropped, best)]
    apart = [distance(program, p, held) for p in (mixed, dropped, best)]
    for naive, index in (("the less important block", 1), ("the block found best in hindsight", 2)):
        acceptance(
            METHOD, 4, "After group distillation, a mixture that runs one block of each two is"
            f" nearer to the dense DiT than the stack that drops {naive} of each two.",
            naive=f"the blocks dropped for all samples, same loss, {STEPS} samples each",
            figure=f"{apart[0]:.4f} against {apart[index]:.4f} of the squared output; denoising"
            f" loss {loss[1]:.4f} against {loss[index + 1]:.4f} (dense {loss[0]:.4f})",
            holds=apart[0] < apart[index],
        )  # fmt: skip
    assert step.receipt.trained[0].kept
    assert apart[0] < apart[1]


def dropped_and_taught(
    program: Program, gone: Sequence[int], sets: Sequence[list[Tensor]], recover: Recover
) -> Program:
    """Drop a block of each group, then teach what is left what the groups gave."""
    new, _ = run_passes(program, [DropBlocks(blocks=tuple(gone))], recover=False)
    teacher, student = cuts_around(program), cuts_around(new)
    blocks = program.blocks()
    kept = [blocks[i] for group in GROUPS for i in group if i not in gone]
    ends: list[tuple[Place, Place]] = []
    for (_, last), block in zip(GROUPS, kept, strict=True):
        pair = student[key_of(block)][1][0], teacher[key_of(blocks[last])][1][0]
        assert pair[0] is not None
        assert pair[1] is not None
        ends.append((pair[0], pair[1]))
    loss = pairs([a for a, _ in ends], [b for _, b in ends], relative_error)
    stage = Stage(name="rest", weights=dict.fromkeys(weight_names(kept)), loss=loss, rate=1e-3)
    taught, _ = Loop("rest", recover).run(program, new, stage, sets)
    return taught


def denoising(toy: Toy, program: Program, held: Sequence[tuple[list[Tensor], Tensor]]) -> float:
    losses = [toy.task.loss(run(program, inputs)[0], target).mean() for inputs, target in held]
    return torch.stack(losses).mean().item()


def distance(old: Program, new: Program, held: Sequence[tuple[list[Tensor], Tensor]]) -> float:
    """Return the squared error of the outputs by the square of the dense ones."""
    both = [(run(old, inputs)[0], run(new, inputs)[0]) for inputs, _ in held]
    error = torch.stack([F.mse_loss(b, a) for a, b in both]).mean()
    return (error / torch.stack([a.square().mean() for a, _ in both]).mean()).item()
