"""AlgoFormer: what a loop is worth where an iterative algorithm solves the problem."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from blockwright.driver.zoo import find_preset
from blockwright.ir.capture import capture
from blockwright.models import algoformer
from blockwright.models.algoformer import AlgoFormer, repeat
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys.in_context import CONFIG, LOOPED, STANDARD, error, in_context

pytestmark = pytest.mark.acceptance


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_loop_beats_as_many_parameters_without_one(acceptance: Acceptance) -> None:
    looped, plain = in_context(CONFIG), in_context(STANDARD)
    assert [*map(torch.numel, looped.parameters())] == [*map(torch.numel, plain.parameters())]
    by_turn = [error(looped, times=times) for times in range(13)]
    ours, theirs = by_turn[12], error(plain)
    falling = all(after < before for before, after in pairwise(by_turn))
    acceptance(
        "algoformer",
        1,
        "1 + 1 + 1 blocks, 12 turns, solve linear regression better at as many parameters and "
        "steps.",
        naive="a transformer of 3 blocks",
        figure=f"squared error {ours:.4f} against {theirs:.4f}, at 14 / 3 of the FLOPs",
        holds=ours < theirs,
    )
    shown = ", ".join(f"{by_turn[times]:.3f}" for times in (1, 2, 4, 6, 8, 10, 12))
    acceptance(
        "algoformer",
        1,
        "The error falls with every turn up to the 12 that were trained.",
        naive="fewer turns",
        figure=f"{shown} after 1, 2, 4, 6, 8, 10, 12 turns",
        holds=falling,
    )
    assert ours < 1  # the mean of the answers as a guess


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_blocks_around_the_loop_help_where_a_representation_is_to_be_found(
    acceptance: Acceptance,
) -> None:
    ours = error(in_context(CONFIG, represented=True), represented=True)
    theirs = error(in_context(LOOPED, represented=True), represented=True)
    acceptance(
        "algoformer",
        2,
        "1 + 1 + 1 blocks solve regression on a random representation better at as many steps.",
        naive="a loop of 1 block alone",
        figure=f"squared error {ours:.4f} against {theirs:.4f}, 12 turns each",
        holds=ours < theirs,
    )
    assert ours < 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_turns_than_trained(acceptance: Acceptance) -> None:
    model = in_context(CONFIG)
    trained, longer = error(model), error(model, times=CONFIG.times + 5)
    acceptance(
        "algoformer",
        5,
        "Five turns more than trained do not diverge where the last turns were supervised.",
        naive="the 12 turns that were trained",
        figure=f"squared error {longer:.4f} after 17 turns, {trained:.4f} after 12 "
        f"({longer / trained - 1:+.1%})",
        holds=longer < 1.05 * trained,
    )


def gradient_step(tokens: Tensor, rate: float = 0.3) -> Tensor:
    """Linear attention whose weights make one step of gradient descent; the last token asks."""
    x, y = tokens[..., :-1], tokens[..., -1:]
    known = slice(None, -1)
    scores = x @ x[..., known, :].mT  # keys and queries pick x
    values = -y[..., known, :]
    step = scores @ values * rate / (tokens.shape[-2] - 1)
    return torch.cat((x, y + step), dim=-1)


def test_a_loop_of_linear_attention_descends_the_gradient(acceptance: Acceptance) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 13, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(4, 5, 1, generator=generator, dtype=torch.float64)
    y = x @ w
    y[:, -1] = 0  # the question
    tokens = torch.cat((x, y), dim=-1)
    states = repeat(gradient_step, tokens, 20)
    weights = torch.zeros_like(w)
    largest = 0.0
    for state in states:
        largest = max(largest, (-state[:, -1:, -1:] - x[:, -1:] @ weights).abs().max().item())
        residual = x[:, :-1] @ weights - y[:, :-1]
        weights = weights - 0.3 / 12 * x[:, :-1].mT @ residual
    acceptance(
        "algoformer",
        4,
        "T turns of a hand-built linear attention predict what T steps of gradient descent do.",
        naive="gradient descent, step by step",
        figure=f"largest difference {largest:.1e} over 20 turns, float64",
        holds=largest < 1e-9,
    )
    assert largest < 1e-9
    first, *_, last = (state[:, -1, -1] + (x @ w)[:, -1, 0] for state in states)
    assert last.norm() < 0.1 * first.norm()  # and they descend


def test_published_ratios(acceptance: Acceptance) -> None:
    def cost(config: algoformer.AlgoFormerConfig) -> tuple[int, float]:
        with torch.device("meta"):
            model = AlgoFormer(config).eval()
            program = capture(model, model.example_inputs(1, 82))
        layers = sum(p.numel() for part in (model.pre, model.loop, model.post)
                     for p in part.parameters())  # fmt: skip
        return layers, program.cost().flops

    parameters, flops = cost(algoformer.ALGOFORMER)
    baseline_parameters, baseline_flops = cost(algoformer.STANDARD)
    acceptance(
        "algoformer",
        6,
        "1 + 1 + 1 blocks, 20 turns: a quarter of the parameters of 12 blocks, 22 / 12 = 1.83 of "
        "their FLOPs.",
        naive="12 blocks",
        figure=f"{parameters:,} against {baseline_parameters:,} parameters of blocks, "
        f"{flops / baseline_flops:.3f} of the FLOPs",
        holds=parameters * 4 == baseline_parameters
        and abs(flops / baseline_flops - 22 / 12) < 0.01,
    )
    assert parameters == 3 * 789_760
    assert parameters * 4 == baseline_parameters
    assert flops / baseline_flops == pytest.approx(22 / 12, rel=0.01)
    preset = find_preset("algoformer")
    assert preset is not None
    assert preset.parameters > parameters
