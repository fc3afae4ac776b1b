"""What TaylorSeer and its gated form claim, on digits, and their memory at the size of FLUX."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import nn

import blockwright as bw
from blockwright.models.dit import DIT_S2, DiT
from blockwright.models.flux import FLUX_1_DEV, Flux
from blockwright.passes import ReuseCache, TaylorCache
from blockwright.passes.shared.trust import interval
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.sampler_runs import Followed, SamplerRuns, draw, engine_of
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "cg_taylor"
STEPS = 50
GATE, FIRST_BLOCK = 0.025, 0.09  # thresholds at which about 20 steps are computed


@pytest.fixture(scope="module")
def runs(toy_dit: Toy) -> SamplerRuns:
    return SamplerRuns(toy_dit)


def count(masks: list[str]) -> float:
    return statistics.mean(mask.count("1") for mask in masks)


def taylor(**options: Any) -> TaylorCache:
    return TaylorCache(steps=STEPS, **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:taylor_cache has taken no step")
def test_exactness(runs: SamplerRuns, acceptance: Acceptance) -> None:
    off = {
        "threshold 0": taylor(threshold=0.0),
        "every step, stack": taylor(when="interval", every=1),
        "every step, modules": taylor(when="interval", every=1, what="modules"),
    }
    errors = {name: runs.cached(pass_, STEPS)[0] for name, pass_ in off.items()}
    session = engine_of(runs.program, taylor(threshold=GATE)).session()
    first = draw(session, 0, STEPS)
    session.reset()
    again = torch.equal(draw(session, 0, STEPS), first)
    short = Followed(engine_of(runs.program, TaylorCache(steps=4, threshold=0.2)).session())
    draw(short, 0, 4)
    acceptance(
        METHOD, 1, "Threshold 0 and interval 1 change nothing, and a run after reset is the first.",
        naive="the model without a cache",
        figure=f"errors {errors}; after reset {'equal bits' if again else 'other bits'};"
        f" of 4 steps {short.full.count('1')} are computed",
        holds=not any(errors.values()) and again and short.full == "1111",
    )  # fmt: skip
    assert not any(errors.values())
    assert again
    assert short.full == "1111"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forecast_against_reuse_on_the_steps_the_gate_chose(
    runs: SamplerRuns, acceptance: Acceptance
) -> None:
    _, masks = runs.cached(taylor(threshold=GATE), STEPS)
    errors = {
        order: runs.cached(taylor(when="mask", mask=masks[0], order=order), STEPS)[0]
        for order in (0, 1)
    }
    ratio = errors[1] / errors[0]
    acceptance(
        METHOD, 2, "On the same steps a linear forecast has at most 0.6 of the error of reuse.",
        naive="the last block's output of the last computed step",
        figure=f"{errors[1]:.4f} against {errors[0]:.4f}, {masks[0].count('1')} of {STEPS} steps",
        holds=ratio <= 0.6,
    )  # fmt: skip
    assert ratio < 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gate_against_a_fixed_rhythm_and_fewer_steps(
    runs: SamplerRuns, acceptance: Acceptance
) -> None:
    gated, masks = runs.cached(taylor(threshold=GATE), STEPS)
    full = round(count(masks))
    fixed, rhythm = runs.cached(taylor(when="interval", first=2, every=3), STEPS)
    late, others = runs.cached(taylor(when="interval", first=6, every=3), STEPS)
    fewer = runs.fewer(full, STEPS)
    acceptance(
        METHOD, 3, "The gate beats a fixed rhythm of as many steps, and fewer steps.",
        naive="first 2 and every 3rd step; first 6 and every 3rd; a shorter run",
        figure=f"{gated:.4f} with {full} steps; {fixed:.4f} with {count(rhythm):.0f},"
        f" {late:.4f} with {count(others):.0f}; {fewer:.4f} with {full} steps in all",
        holds=gated < min(fixed, fewer),
    )  # fmt: skip
    assert count(rhythm) == 18
    assert count(others) == 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gate_against_the_first_block_cache(runs: SamplerRuns, acceptance: Acceptance) -> None:
    """Both compute the first block on every step."""
    gated, masks = runs.cached(taylor(threshold=GATE), STEPS)
    reuse = ReuseCache(steps=STEPS, when="first-block", threshold=FIRST_BLOCK)
    plain, others = runs.cached(reuse, STEPS)
    blocks = [STEPS + count(found) * (runs.depth - 1) for found in (masks, others)]
    acceptance(
        METHOD, 4, "At as many blocks the gate has a quarter of the error of a first-block cache.",
        naive="first-block cache: what the other blocks added on the last computed step",
        figure=f"{gated:.4f} with {blocks[0]:.0f} blocks, {plain:.4f} with {blocks[1]:.0f}",
        holds=gated <= plain / 4 and blocks[0] <= 1.05 * blocks[1],
    )  # fmt: skip
    assert gated < plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_warm_up_modules_and_basis(runs: SamplerRuns, acceptance: Acceptance) -> None:
    def error(first: int, order: int, **options: Any) -> float:
        pass_ = taylor(when="interval", first=first, every=3, order=order, **options)
        return runs.cached(pass_, STEPS)[0]

    late = {order: error(6, order) for order in (0, 1)}
    early = {order: error(2, order) for order in (0, 1)}
    acceptance(
        METHOD, 5, "After 6 first steps a linear forecast beats reuse; after 2 it does not.",
        naive="reuse on the same steps",
        figure=f"6 first steps: {late[1]:.4f} against {late[0]:.4f};"
        f" 2 first steps: {early[1]:.4f} against {early[0]:.4f}",
        holds=late[1] < late[0] and early[1] > early[0],
    )  # fmt: skip
    modules = error(6, 1, what="modules")
    acceptance(
        METHOD, 6, "One forecast of the last block costs little accuracy against one per module.",
        naive="forecasts of every attention and network, 16 tensors and not 2",
        figure=f"{late[1]:.4f} against {modules:.4f}",
        holds=late[1] <= 1.5 * modules,
    )  # fmt: skip
    newton, powers = error(2, 2, basis="newton"), error(2, 2)
    acceptance(
        METHOD, 7, "Of order 2 with a short warm-up, Newton's form is better than Taylor's.",
        naive="differences weighted as a Taylor series",
        figure=f"{newton:.4f} against {powers:.4f}",
        holds=newton < powers,
    )  # fmt: skip
    assert late[1] < late[0]


def test_schedules_and_speed_at_published_settings(acceptance: Acceptance) -> None:
    published = {(2, 4): 3.57, (2, 3): 2.78, (3, 6): 5.00, (3, 5): 4.17, (3, 4): 3.57}
    counts = {key: interval(STEPS, *key).count("1") for key in published}
    speeds = {key: STEPS / full for key, full in counts.items()}
    agree = all(abs(speeds[key] - value) < 0.006 for key, value in published.items())
    acceptance(
        METHOD, 8, "The published intervals compute 14, 18, 10, 12 and 14 of 50 steps.",
        naive="all steps", figure=f"{list(counts.values())} steps", holds=agree,
    )  # fmt: skip
    assert list(counts.values()) == [14, 18, 10, 12, 14]
    assert agree


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_at_the_size_of_flux(acceptance: Acceptance) -> None:
    """1024 x 1024 pixels, 512 words, bfloat16; nothing is allocated."""
    with torch.device("meta"):
        model = Flux(FLUX_1_DEV).eval().to(torch.bfloat16)
        image, text, pooled, *rest = model.example_inputs(1, rows=64, columns=64, words=512)
    tokens = [value.to(torch.bfloat16) for value in (image, text, pooled)]
    program = bw.capture(model, (*tokens, *rest))
    rows = 38 * (4096 + 512) + 38 * 4608  # 4 per joint block, 1 per single block
    own = {"dtype": "model"}
    found = {
        "gate": taylor(order=1, probe_order=1, **own),
        "modules, order 1": taylor(what="modules", when="interval", order=1, **own),
        "modules, order 2": taylor(what="modules", when="interval", order=2, **own),
    }
    bytes_ = {name: p.prepared(program).cost().state_bytes for name, p in found.items()}
    expected = {name: n * 3072 * 2 for name, n in
                zip(found, (4 * 4096, 2 * rows, 3 * rows), strict=True)}  # fmt: skip
    close = all(abs(bytes_[name] / expected[name] - 1) < 1e-3 for name in found)
    acceptance(
        METHOD, 9, "On FLUX.1-dev the gate keeps 101 MB, forecasts of all modules 4.3 and 6.5 GB.",
        naive="TaylorSeer of order 1 and 2",
        figure=", ".join(f"{name}: {size / 1e6:,.0f} MB" for name, size in bytes_.items()),
        holds=close,
    )  # fmt: skip
    assert close


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_steps_that_are_left_out_take_no_time(acceptance: Acceptance) -> None:
    """A DiT-S/2 of random weights; processor time, on ONNX Runtime."""
    torch.manual_seed(0)
    model = DiT(DIT_S2).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    example = model.example_inputs(1)
    mask = "1111000100010001"
    times = {}
    for name, flags in (("cached", mask), ("full", "1" * len(mask))):
        options = TaylorCache(steps=len(mask), when="mask", mask=flags)
        session = engine_of(bw.capture(model, example), options, "onnxruntime").session()
        session(*example)
        session.reset()
        start = time.process_time()
        for _ in mask:
            session(*example)
        times[name] = time.process_time() - start
    ideal, found = len(mask) / mask.count("1"), times["full"] / times["cached"]
    acceptance(
        METHOD, 10, "A run takes as much less time as blocks are left out, to 90 %.",
        naive="the share of the blocks that are computed",
        figure=f"{found:.2f} times as fast, of {ideal:.2f}",
        holds=found >= 0.9 * ideal,
    )  # fmt: skip
    assert found > 0.7 * ideal
