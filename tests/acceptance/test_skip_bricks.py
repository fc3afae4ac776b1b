"""Skipping bricks by a schedule inside one program: what it saves at the published sizes."""

from __future__ import annotations

import pytest
import torch

from blockwright.ir.capture import capture
from blockwright.ir.rewrite import rewrite
from blockwright.models.lego import XL_PG_32, XL_PR_32, Lego, LegoConfig
from blockwright.passes import SkipBricks
from blockwright.testing.acceptance import Acceptance

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("order", "config", "when", "published"),
    [("growing", XL_PG_32, "late", 0.634), ("refining", XL_PR_32, "early", 0.887)],
)
def test_half_of_the_steps_without_the_last_brick(
    order: str, config: LegoConfig, when: str, published: float, acceptance: Acceptance
) -> None:
    with torch.device("meta"):
        model = Lego(config).eval()
        inputs = model.example_inputs(1)
    schedule = SkipBricks(steps=2, when=when)
    program = schedule.prepared(capture(model, inputs))
    plan = schedule.plan(program)
    replaced = [
        (region, schedule.replace(region, plan.decisions[region.label]))
        for region in schedule.regions(program)
    ]
    for _, module in replaced:  # the schedule itself is no weight: its values are known
        module.condition.active = module.condition.active.to("cpu")
    cost = rewrite(program, replaced, by=schedule.name).cost()
    factor = cost.expected_flops / program.cost().flops
    acceptance(
        "lego",
        2,
        f"Without the last brick in half of the steps, LEGO-XL ({order}) costs {published} times "
        "as much.",
        naive="the whole chain on every step",
        figure=f"{factor:.3f} times the operations of a call, on average",
        holds=abs(factor - published) < 0.01,
    )
    assert factor == pytest.approx(published, abs=0.02)
