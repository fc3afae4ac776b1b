"""What Delta-DiT claims: offsets against stored results, and which blocks when, on digits."""

from __future__ import annotations

import pytest
import torch

import blockwright as bw
from blockwright.models.dit import DiT, DiTConfig
from blockwright.passes import DeltaCache
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.sampler_runs import SamplerRuns, engine_of
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "delta_dit"


@pytest.fixture(scope="module")
def runs(toy_dit: Toy) -> SamplerRuns:
    return SamplerRuns(toy_dit)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rear_offsets_against_rear_results(runs: SamplerRuns, acceptance: Acceptance) -> None:
    def error(steps: int, value: str) -> float:
        return runs.cached(DeltaCache(steps=steps, count=2, stages="rear", value=value), steps)[0]

    found = {steps: (error(steps, "offset"), error(steps, "output")) for steps in (4, 20, 50)}
    acceptance(
        METHOD, 1, "Without the rear half, the offset has at most half the error of the result.",
        naive="what the rear blocks gave on the last full step",
        figure="; ".join(f"{k} steps: {a:.4f} against {b:.4f}" for k, (a, b) in found.items()),
        holds=all(a <= b / 2 for a, b in found.values()),
    )  # fmt: skip
    assert all(a < b for a, b in found.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_front_offsets_against_front_results(runs: SamplerRuns, acceptance: Acceptance) -> None:
    """Of few steps: a stored result shuts the image of this step out."""

    def error(steps: int, value: str) -> float:
        return runs.cached(DeltaCache(steps=steps, count=2, stages="front", value=value), steps)[0]

    found = {steps: (error(steps, "offset"), error(steps, "output")) for steps in (4, 8)}
    acceptance(
        METHOD, 2, "With few steps, the offset of the front half is far better than its result.",
        naive="what the front blocks gave on the last full step",
        figure="; ".join(f"{k} steps: {a:.4f} against {b:.4f}" for k, (a, b) in found.items()),
        holds=all(a < b for a, b in found.values()),
    )  # fmt: skip
    assert found[4][0] < found[4][1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rear_early_and_front_late(runs: SamplerRuns, acceptance: Acceptance) -> None:
    def error(steps: int, stages: str) -> float:
        return runs.cached(DeltaCache(steps=steps, count=2, stages=stages), steps)[0]

    orders = ("rear-front", "front-rear", "rear")
    found = {steps: {order: error(steps, order) for order in orders} for steps in (10, 20)}
    acceptance(
        METHOD, 3, "Rear blocks early and front blocks late is better than the other way round.",
        naive="front blocks early; rear blocks throughout",
        figure="; ".join(
            f"{steps} steps: {by['rear-front']:.4f} against {by['front-rear']:.4f};"
            f" rear throughout {by['rear']:.4f}" for steps, by in found.items()
        ),
        holds=all(by["rear-front"] < by["front-rear"] for by in found.values()),
    )  # fmt: skip
    assert all(error < 1 for by in found.values() for error in by.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_against_fewer_steps(runs: SamplerRuns, acceptance: Acceptance) -> None:
    """Three of four blocks on average, or three of four steps."""
    delta, masks = runs.cached(DeltaCache(steps=50, count=2, stages="rear"), 50)
    fewer = runs.fewer(38, 50)
    acceptance(
        METHOD, 4, "Rear offsets every other of 50 steps beat a run of as many blocks.",
        naive="38 steps", figure=f"{delta:.4f} against {fewer:.4f}", holds=delta < fewer,
    )  # fmt: skip
    assert masks[0] == "10" * 25


def test_counts_at_published_settings(acceptance: Acceptance) -> None:
    published = {(20, 21): 1.600, (4, 4): 1.077, (4, 6): 1.120}
    found = {}
    for steps, count in published:
        schedule = DeltaCache(steps=steps, count=count)
        computed = sum(schedule.column(k, 28).count("1") for k in range(1, 29))
        found[steps, count] = steps * 28 / computed
    agree = all(abs(found[key] - value) < 0.001 for key, value in published.items())
    acceptance(
        METHOD, 5, "Without 21, 4, 6 of 28 blocks every other step: speeds of 1.60, 1.08, 1.12.",
        naive="all blocks", figure=", ".join(f"{value:.3f}" for value in found.values()),
        holds=agree,
    )  # fmt: skip
    assert agree


def test_memory_of_an_offset(acceptance: Acceptance) -> None:
    """DiT-XL/2 at 1024 x 1024 pixels in half precision; as deep as it must be for one offset."""
    with torch.device("meta"):
        model = DiT(DiTConfig(latent=128, depth=4)).eval().half()
        x, time, label = model.example_inputs(1)
    program = bw.capture(model, (x.half(), time, label))
    size = DeltaCache(steps=20, count=2, stages="rear").prepared(program).cost().state_bytes
    acceptance(
        METHOD, 6, "An offset of 4096 tokens of DiT-XL takes 9.4 MB.",
        naive="FORA keeps two such tensors per block", figure=f"{size / 1e6:.1f} MB",
        holds=abs(size / 9.437e6 - 1) < 0.001,
    )  # fmt: skip
    assert size == pytest.approx(9.437e6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_schedule_is_known_ahead(runs: SamplerRuns, acceptance: Acceptance) -> None:
    """Cost on average, from the table in the program."""
    full = runs.program.cost().flops
    engine = engine_of(runs.program, DeltaCache(steps=50, count=2))
    share = engine.program.cost().expected_flops / full
    acceptance(
        METHOD, 7, "The work of a run is known before it runs.",
        naive="half of the blocks on half of the steps", figure=f"{share:.3f} of all operations",
        holds=0.74 < share < 0.78,
    )  # fmt: skip
    assert 0.74 < share < 0.78
