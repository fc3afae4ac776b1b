"""LEGO: what can be left out of a chain of bricks, and when."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from blockwright.driver.zoo import find_preset
from blockwright.ir.capture import capture
from blockwright.models.lego import BrickConfig, Lego, places
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import bricks as toy
from blockwright.testing.toys import data

pytestmark = pytest.mark.acceptance
STEPS = 12
DRAWN = torch.arange(120) % data.CLASSES
LEVELS = (0.05, 0.2, 0.8, 3.0)  # noise at which estimates are compared


def drawn(config: toy.LegoConfig) -> Lego:
    """A model of random weights; none of its bricks is zero."""
    torch.manual_seed(0)
    model = Lego(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def errors(model: Lego, level: float) -> list[float]:
    """The mean squared error of each brick's estimate of clean validation images."""
    _, held = data.digits()
    noise = torch.randn(held.images.shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.full((len(held),), level)
    with torch.no_grad():
        found = toy.estimates(model, held.images, noise, sigma, held.labels)
    return (found - held.images).square().mean((1, 2, 3, 4)).tolist()


def damage(model: Lego, during: Collection[int]) -> float:
    """How far drawings move when the last brick is left out in some steps, squared."""
    full = toy.draw(model, DRAWN, steps=STEPS)
    less = toy.draw(model, DRAWN, steps=STEPS, skipped=(1,), during=during)
    return (less - full).square().mean().item()


def test_a_chain_that_ends_early_is_the_intermediate_estimate(acceptance: Acceptance) -> None:
    model, (_, held) = drawn(toy.REFINING), data.digits()
    inputs = held.images[:8], torch.linspace(-1, 1, 8), held.labels[:8]
    first, last = model.estimates(*inputs)
    (alone,) = model.estimates(*inputs, skipped=(1,))
    equal = torch.equal(alone, first) and torch.equal(model(*inputs), last)
    acceptance(
        "lego",
        1,
        "Leaving out the last brick gives the estimate of the one before it, bit for bit.",
        naive="the intermediate estimate of the whole chain",
        figure=f"largest difference {(alone - first).abs().max():.1g}",
        holds=equal,
    )
    assert equal
    assert not torch.equal(first, last)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_local_brick_helps_where_there_is_little_noise(acceptance: Acceptance) -> None:
    model = toy.bricks(toy.REFINING)
    pairs = [errors(model, level) for level in LEVELS]
    gains = [1 - last / first for first, last in pairs]
    acceptance(
        "lego",
        2,
        "After a global brick the local one lowers the error most where there is little noise.",
        naive="the same brick at much noise",
        figure="error lowered by "
        + ", ".join(f"{g:.0%} at {level}" for g, level in zip(gains, LEVELS, strict=True)),
        holds=max(gains) == gains[0] and gains[0] > 0,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", ["refining", "growing"])
def test_when_the_last_brick_can_be_left_out(order: str, acceptance: Acceptance) -> None:
    model = toy.bricks(toy.REFINING if order == "refining" else toy.GROWING)
    noisy, clean = damage(model, range(STEPS // 2)), damage(model, range(STEPS // 2, STEPS))
    when, first, second = (
        ("first", noisy, clean) if order == "refining" else ("second", clean, noisy)
    )
    last = "local" if order == "refining" else "global"
    acceptance(
        "lego",
        2,
        f"The {last} brick at the end can best be left out in the {when} half of the steps.",
        naive="leave it out in the other half",
        figure=f"drawings move by {first:.4f} against {second:.4f}, mean of squares; in all steps "
        f"{damage(model, range(STEPS)):.4f}",
        holds=first < second,
    )


def multiply_adds(model: Lego) -> float:
    by_kind = capture(model, model.example_inputs(1)).cost().by_kind
    return sum(flops / 2 for kind, flops in by_kind.items() if kind != "elementwise")


def without_last(model: Lego, blocks: int) -> Lego:
    """The same plain DiT without its last blocks."""
    (brick,) = model.config.bricks
    shallow = BrickConfig(brick.region, brick.patch, brick.depth - blocks)
    cut = Lego(replace(model.config, bricks=(shallow,))).eval()
    cut.load_state_dict(model.state_dict(), strict=False)
    return cut


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_plain_dit_cannot_end_early(acceptance: Acceptance) -> None:
    chain, plain = toy.bricks(toy.REFINING), toy.bricks(toy.PLAIN)
    whole, alone = multiply_adds(chain), multiply_adds(drawn(replace(
        toy.REFINING, bricks=toy.REFINING.bricks[:1])))  # fmt: skip
    saved = 1 - alone / whole
    assert multiply_adds(plain) == pytest.approx(whole, rel=0.1)
    blocks = next(
        n for n in range(1, 11) if 1 - multiply_adds(without_last(plain, n)) / whole > saved - 0.05
    )
    for level in (0.2, 0.8):
        first, last = errors(chain, level)
        (full,), (short,) = errors(plain, level), errors(without_last(plain, blocks), level)
        (one_less,) = errors(without_last(plain, 1), level)
        acceptance(
            "lego",
            3,
            f"Saving {saved:.0%} of the multiply-adds by a brick costs less than by blocks, at "
            f"noise {level}.",
            naive=f"remove the last {blocks} of {plain.config.bricks[0].depth} blocks of a DiT",
            figure=f"squared error {last:.4f} to {first:.4f} against {full:.4f} to {short:.4f}; "
            f"{one_less:.4f} with 1 block less",
            holds=first - last < short - full,
        )


def test_larger_canvases_and_local_regions(acceptance: Acceptance) -> None:
    model = drawn(toy.REFINING)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 1, 16, 16, generator=generator)
    wide = model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert wide.shape == x.shape
    brick, condition = model.bricks[1], torch.randn(1, model.config.dim, generator=generator)

    def features(pixels: Tensor) -> Tensor:
        return torch.cat((pixels, pixels, places(pixels)), dim=1)

    changed = x.clone()
    changed[..., 4:6, 8:10] += 1  # one region of 2 x 2
    moved = (brick(features(x), condition) != brick(features(changed), condition))[0, 0]
    inside = moved[4:6, 8:10].all().item()
    outside = int(moved.sum()) - 4
    acceptance(
        "lego",
        4,
        "A model of 8 x 8 images takes 16 x 16, and a region depends on itself and its place "
        "alone.",
        naive="change the pixels of one region",
        figure=f"{outside} of 252 pixels of other regions move",
        holds=bool(inside) and outside == 0,
    )
    assert inside
    assert outside == 0


@cache
def published(name: str) -> tuple[int, float, list[float]]:
    """Parameters with fixed tables, and multiply-adds in 1e9: of all, and of each brick."""
    preset = find_preset(name)
    assert preset is not None
    model = preset.sketch()
    with torch.device("meta"):
        cost = capture(model, preset.example_inputs(model)).cost()
    tables = sum(buffer.numel() for buffer in model.buffers())
    parts = [
        sum(f for path, f in cost.by_path.items() if path.startswith(f"bricks.{index}.")) / 2e9
        for index in range(len(model.config.bricks))
    ]
    return preset.parameters + tables, cost.flops / 2e9, parts


def test_published_sizes(acceptance: Acceptance) -> None:
    table = {
        "lego-s-pg-64": (33.75, 20.3),
        "lego-xl-pg-32": (729.4, 81.1),
        "lego-xl-u-32": (1262.0, 142.8),
    }
    found = {name: published(name)[:2] for name in table}
    holds = all(
        abs(found[name][0] / 1e6 / millions - 1) < 5e-4 and abs(found[name][1] / macs - 1) < 0.015
        for name, (millions, macs) in table.items()
    )
    acceptance(
        "lego",
        5,
        "Sizes of the released models, and multiply-adds of one call.",
        naive="closed form: " + ", ".join(f"{m} M, {g} G" for m, g in table.values()),
        figure=", ".join(
            f"{name.removeprefix('lego-')} {n / 1e6:.2f} M, {g:.1f} G"
            for name, (n, g) in found.items()
        ),
        holds=holds,
    )
    assert found["lego-s-pg-64"][0] == 33_750_360
    assert found["lego-xl-u-32"][0] == 1_261_977_392
    assert holds


def test_published_savings(acceptance: Acceptance) -> None:
    _, whole, parts = published("lego-xl-pg-32")
    growing, refining = (1 - 0.5 * part / whole for part in (parts[-1], parts[0]))
    acceptance(
        "lego",
        6,
        "XL-32 without its last brick in half of the steps costs 0.634 growing and 0.887 refining.",
        naive="all bricks in every step",
        figure=f"{growing:.3f} and {refining:.3f}; bricks cost "
        + ", ".join(f"{part:.1f}" for part in parts)
        + " G",
        holds=abs(growing - 0.634) < 0.005 and abs(refining - 0.887) < 0.005,
    )
    assert growing == pytest.approx(0.634, abs=0.005)
    assert refining == pytest.approx(0.887, abs=0.005)
