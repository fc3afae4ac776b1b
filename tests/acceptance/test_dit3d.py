"""What DiT-3D says of windows and of blocks trained on images, at published sizes and small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import DiT, DiTConfig
from blockwright.models.dit3d import (
    DIT3D_B4,
    DIT3D_L4,
    DIT3D_S4,
    DIT3D_XL4,
    Block,
    DiT3D,
    DiT3DConfig,
    transfer,
)
from blockwright.passes import WindowAttention
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys.diffusion import TIMES, kept_signal
from blockwright.testing.toys.training import Plan, train

pytestmark = pytest.mark.acceptance
METHOD = "dit3d"
FOURTHS, NINTHS = (0, 3, 6, 9), tuple(range(0, 25, 3))
TABLE = {  # sizes, billions of multiply-adds: whole, with windows; attention alone, both ways
    "S/4": (DIT3D_S4, FOURTHS, 13.37, 12.67, 2.42, 1.71),
    "B/4": (DIT3D_B4, FOURTHS, 48.51, 47.10, 4.83, 3.42),
    "XL/4": (DIT3D_XL4, NINTHS, 245.7, 240.9, 16.9, 12.2),
    "S/2": (replace(DIT3D_S4, patch=2), FOURTHS, 241.7, 190.9, 154.6, 103.9),
    "XL/2": (replace(DIT3D_XL4, patch=2), NINTHS, 2909, 2567, 1082, 740),
    "XL/2 of 64 voxels": (
        replace(DIT3D_XL4, voxels=64, patch=2), NINTHS, 83883, 61661, 69269, 47048
    ),
}  # fmt: skip
QUICK = ("S/4",)


def billions(config: DiT3DConfig) -> tuple[float, float]:
    """Return the multiply-adds of one sample in 10^9: all, and those of attention."""
    with torch.device("meta"):
        model = DiT3D(config).eval()
        kinds = capture(model, model.example_inputs(1)).cost().by_kind
    whole = sum(n for kind, n in kinds.items() if kind != "elementwise")
    return whole / 2e9, kinds["attention"] / 2e9


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TABLE]
)
def test_multiply_adds_with_windows_in_every_third_block(name: str, acceptance: Acceptance) -> None:
    config, windowed, *expected = TABLE[name]
    (whole, attention), (fewer, less) = (
        billions(replace(config, windowed=blocks)) for blocks in ((), windowed)
    )
    found = [whole, fewer, attention, less]
    digits = [len(str(n).partition(".")[2]) for n in expected]
    holds = [round(n, d) for n, d in zip(found, digits, strict=True)] == expected
    acceptance(
        METHOD, 2, f"DiT-3D-{name}: windows of 4 x 4 x 4 patches in every third block take"
        f" {expected[0]:g} GMAC to {expected[1]:g}, those of attention {expected[2]:g} to"
        f" {expected[3]:g}.",
        naive="attention among all patches in every block",
        figure=f"{whole:.2f} to {fewer:.2f}, of attention {attention:.2f} to {less:.2f}",
        holds=holds,
    )  # fmt: skip
    assert holds


def test_published_parameters(acceptance: Acceptance) -> None:
    with torch.device("meta"):
        found = [
            sum(p.numel() for p in DiT3D(config).parameters())
            for config in (DIT3D_S4, DIT3D_B4, DIT3D_L4, DIT3D_XL4)
        ]
    acceptance(
        METHOD, 2, "Parameters of S/4, B/4, L/4, XL/4: 32.6 M, 129.8 M, 578 M, 674 M.",
        naive="none", figure=", ".join(f"{n:,}" for n in found), holds=True,
    )  # fmt: skip
    assert [round(n / 1e6, 1) for n in found[:2]] == [32.6, 129.8]
    assert [round(n / 1e6) for n in found[2:]] == [578, 674]


def test_windows_are_blocks_of_a_mask_and_one_window_is_no_window(acceptance: Acceptance) -> None:
    config = DiT3DConfig(voxels=8, patch=1, dim=24, heads=2, depth=1, ffn_dim=24, window=4)
    torch.manual_seed(0)
    windowed, whole = Block(config, 8), Block(replace(config, window=8), 8)
    whole.load_state_dict(windowed.state_dict())
    place = torch.cartesian_prod(*[torch.arange(8)] * 3) // 4
    mask = (place[:, None] == place).all(-1)
    apart, same = 0.0, 0.0
    for batch in (1, 3, 16):
        x = torch.randn(batch, 512, 24)
        q, k, v = windowed.attention.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        found = windowed.attend(x) - windowed.attention.out(masked)
        apart = max(apart, found.abs().max().item())
        same = max(same, (whole.attend(x) - whole.attention(x)).abs().max().item())
    acceptance(
        METHOD, 1, "Attention within 4 x 4 x 4 windows is attention under a mask of blocks, at"
        " batches of 1, 3 and 16 (the released code mixes samples).",
        naive="512 x 512 masked scores", figure=f"largest difference {apart:.1e}",
        holds=apart <= 1e-6,
    )  # fmt: skip
    acceptance(
        METHOD, 4, "A window as large as the grid changes nothing.", naive="no windows",
        figure=f"largest difference {same:.1e}", holds=same <= 1e-6,
    )  # fmt: skip
    assert apart <= 1e-6
    assert same <= 1e-6


SIDE = 8
SIZES = {"dim": 24, "heads": 2, "ffn_dim": 96}
SHAPES = DiT3DConfig(voxels=SIDE, patch=1, depth=6, **SIZES)
LONG = Plan(steps=400, batch=4, rate=2e-3)
SHORT = Plan(steps=120, batch=4, rate=1e-3)


def solids(count: int, generator: Generator) -> Tensor:
    """Return soft balls in three colours, each over a colour of all space: [count, 3, x, y, z]."""
    centre = SIDE * torch.rand(count, 3, 3, 1, 1, 1, generator=generator)
    radius = 1.5 + 2 * torch.rand(count, 3, 1, 1, 1, generator=generator)
    places = torch.stack(torch.meshgrid(*[torch.arange(SIDE) + 0.5] * 3, indexing="ij"))
    space = torch.randn(count, 3, 1, 1, 1, generator=generator)
    return torch.tanh(radius - (places - centre).norm(dim=2)) + space


def noised(clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return clean values under noise, the times, and the noise."""
    times = torch.randint(TIMES, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    kept = kept_signal(times).view(-1, *[1] * (clean.dim() - 1))
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise, times.float(), noise


def solid_loss(model: nn.Module, generator: Generator) -> Tensor:
    noisy, times, noise = noised(solids(LONG.batch, generator), generator)
    return F.mse_loss(model.denoise(noisy, times, torch.zeros(LONG.batch).long()), noise)  # type: ignore[operator]


def slice_loss(model: nn.Module, generator: Generator) -> Tensor:
    slices = solids(LONG.batch, generator).transpose(1, 2).flatten(0, 1)
    noisy, times, noise = noised(slices, generator)
    predicted, _ = model(noisy, times, torch.zeros(len(slices)).long()).chunk(2, dim=1)
    return F.mse_loss(predicted, noise)


class Voxels(nn.Module):
    """What a DiT-3D makes of voxels."""

    def __init__(self, model: DiT3D) -> None:
        super().__init__()
        self.model = model

    def forward(self, grid: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.model.denoise(grid, time, label)


def held_out(predict: Callable[..., Tensor]) -> float:
    """Return the mean loss of what was not trained on."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        losses = []
        for _ in range(12):
            noisy, times, noise = noised(solids(LONG.batch, generator), generator)
            predicted = predict(noisy, times, torch.zeros(LONG.batch).long())
            losses.append(F.mse_loss(predicted, noise).item())
    return sum(losses) / len(losses)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fewer_windows_lose_less(acceptance: Acceptance) -> None:
    model = Voxels(train(lambda: DiT3D(SHAPES), solid_loss, LONG, "DiT-3D")).eval()
    inputs = (torch.zeros(LONG.batch, 3, SIDE, SIDE, SIDE), torch.zeros(LONG.batch),
              torch.zeros(LONG.batch).long())  # fmt: skip
    program = capture(model, inputs)
    passes = [WindowAttention(grid=(8, 8, 8), window=(4,), every=n) for n in (3, 1)]
    some, every = (run_passes(program, [pass_])[0] for pass_ in passes)

    def loss(of: Program) -> float:
        return held_out(lambda *x: run(of, list(x))[0])

    losses = [loss(p) for p in (program, some, every)]
    macs = [p.cost().by_kind["attention"] for p in (program, some, every)]
    acceptance(
        METHOD, 2, "On a 8 x 8 x 8 grid, windows in every third block lose less than windows in all"
        " blocks, without training back.",
        naive="windows of 4 x 4 x 4 in all blocks",
        figure=f"denoising loss {losses[1]:.4f} against {losses[2]:.4f} (no windows"
        f" {losses[0]:.4f}); attention at {macs[1] / macs[0]:.3f} and {macs[2] / macs[0]:.3f}",
        holds=losses[1] < losses[2],
    )  # fmt: skip
    assert macs[2] / macs[0] == pytest.approx(64 / 512)
    assert macs[1] / macs[0] == pytest.approx((4 + 2 * 64 / 512) / 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_blocks_of_images_are_a_better_start(acceptance: Acceptance) -> None:
    flat = DiTConfig(latent=SIDE, patch=1, channels=3, classes=1, depth=6, **SIZES)
    source = train(lambda: DiT(flat), slice_loss, LONG, "DiT").state_dict()

    def after(*patterns: str) -> float:
        def build() -> DiT3D:
            model = DiT3D(SHAPES)
            transfer(source, model, patterns)
            return model

        return held_out(train(build, solid_loss, SHORT, "DiT-3D").denoise)

    fresh, whole = after(), after("blocks.*")
    networks = after("blocks.*.up.*", "blocks.*.down.*")
    attentions = after("blocks.*.attention.*")
    acceptance(
        METHOD, 3, f"After {SHORT.steps} steps, a DiT-3D that began with the blocks of a DiT of"
        " slices is ahead of one that began anew.",
        naive="random weights, same steps", figure=f"loss {whole:.4f} against {fresh:.4f}",
        holds=whole < fresh,
    )  # fmt: skip
    acceptance(
        METHOD, 3, "Copying the networks alone, or the attentions alone, is in between.",
        naive="all of the blocks, or nothing",
        figure=f"networks {networks:.4f}, attentions {attentions:.4f}, all {whole:.4f},"
        f" nothing {fresh:.4f}",
        holds=all(min(whole, fresh) < x < max(whole, fresh) for x in (networks, attentions)),
    )  # fmt: skip
    assert min(fresh, whole) < 1  # less than the noise itself
