"""What StyleSwin says of seeing straight and shifted windows at once: sizes, reach and borders."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from blockwright.ir.capture import capture
from blockwright.models.styleswin import (
    STYLESWIN_256,
    STYLESWIN_256_NARROW,
    STYLESWIN_512,
    STYLESWIN_1024,
    DoubleAttention,
    StyleSwin,
    StyleSwinConfig,
    WindowCore,
)
from blockwright.models.swin import join_windows, shift_mask, split_windows
from blockwright.passes.shared.windows import HeadGroup, WindowedAttention, WindowPlan
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys.training import Plan, train

pytestmark = pytest.mark.acceptance
METHOD = "styleswin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "parameters", "billions"),
    [
        ("1024", STYLESWIN_1024, 40.863, 52.5),
        ("512", STYLESWIN_512, 40.79, 41.1),
        ("256", STYLESWIN_256, 48.93, 95.6),
        ("256, narrow", STYLESWIN_256_NARROW, 40.63, None),
    ],
)
def test_published_sizes(
    name: str, config: StyleSwinConfig, parameters: float, billions: float | None,
    acceptance: Acceptance,
) -> None:  # fmt: skip
    with torch.device("meta"):
        model = StyleSwin(config).eval()
        kinds = capture(model, model.example_inputs(1)).cost().by_kind
    count = sum(p.numel() for p in model.parameters())
    macs = sum(n for kind, n in kinds.items() if kind != "elementwise") / 2e9
    digits = len(f"{parameters}".split(".")[1])
    holds = round(count / 1e6, digits) == parameters
    holds = holds and (billions is None or round(macs, 1) == billions)
    acceptance(
        METHOD, 1, f"StyleSwin-{name}: {parameters:g} M parameters"
        + (f", {billions:g} G multiply-adds." if billions else "."),
        naive="none", figure=f"{count:,} and {macs:.2f} G", holds=holds,
    )  # fmt: skip
    assert holds


def rolled(q: Tensor, k: Tensor, v: Tensor, side: int, window: int, shift: int) -> Tensor:
    """Attend as Swin does: roll, cut, attend under a mask for each sample's windows, undo."""
    batch, heads = q.shape[:2]
    x = torch.stack([q, k, v], dim=2).permute(0, 3, 2, 1, 4).unflatten(1, (side, side)).flatten(3)
    bias = None
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
        bias = shift_mask(side, window, shift)[:, None].repeat(batch, 1, 1, 1)
        bias = bias.masked_fill(bias < 0, -torch.inf)
    parts = split_windows(x, window).unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)
    y = F.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2).flatten(2)
    y = join_windows(y, window, side, side)
    y = y.roll((shift, shift), dims=(1, 2)) if shift else y
    return y.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def double(side: int, window: int, first: int, second: int) -> WindowedAttention:
    shift = [window // 2 if side > window else 0] * 2
    groups = [HeadGroup(first, [window] * 2, [0, 0]), HeadGroup(second, [window] * 2, shift)]
    return WindowedAttention(WindowPlan([side, side], groups), first + second, first + second)


def halves(given: list[Tensor], first: int, side: int, window: int) -> Tensor:
    """Attend with the first heads in straight windows and the others in shifted ones."""
    shift = window // 2 if side > window else 0
    straight = rolled(*(x[:, :first] for x in given), side, window, 0)
    return torch.cat([straight, rolled(*(x[:, first:] for x in given), side, window, shift)], dim=1)


def test_double_attention_is_what_rolling_and_cutting_give(acceptance: Acceptance) -> None:
    apart = 0.0
    for side in (8, 16, 32):
        for first, second in ((2, 2), (3, 1), (1, 2)):
            torch.manual_seed(side)
            given = [torch.randn(2, first + second, side**2, 8, requires_grad=True)
                     for _ in range(3)]  # fmt: skip
            ours = double(side, 8, first, second)(*given)
            theirs = halves(given, first, side, 8)
            toward = torch.randn_like(ours)
            pairs = zip(
                (ours, *torch.autograd.grad(ours, given, toward)),
                (theirs, *torch.autograd.grad(theirs, given, toward)),
                strict=True,
            )
            apart = max(apart, *((a - b).abs().max().item() for a, b in pairs))
    acceptance(
        METHOD, 1, "Heads in straight and in shifted windows give what rolling, cutting and masking"
        " give, forwards and backwards, at 8, 16 and 32 pixels and with odd shares of the heads.",
        naive="roll, cut, two attentions, undo", figure=f"largest difference {apart:.1e}",
        holds=apart <= 1e-5,
    )  # fmt: skip
    assert apart <= 1e-5


def test_one_block_sees_across_borders(acceptance: Acceptance) -> None:
    def seen(core: Callable[..., Tensor], pixel: tuple[int, int]) -> tuple[int, int, int, int]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 24**2, 4, requires_grad=True) for _ in range(3))
        core(q, k, v)[0, :, pixel[0] * 24 + pixel[1]].sum().backward()
        assert v.grad is not None
        rows, columns = v.grad[0].abs().sum((0, 2)).view(24, 24).nonzero().unbind(1)
        return (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max()))

    both = seen(double(24, 8, 1, 1), (9, 14))
    single = seen(
        WindowedAttention(WindowPlan([24, 24], [HeadGroup(2, [8, 8], [0, 0])]), 2, 2), (9, 14)
    )
    acceptance(
        METHOD, 2, "In one block a pixel sees its window and the one shifted by half of it.",
        naive="straight windows: rows 8 to 15, columns 8 to 15",
        figure=f"rows {both[0]} to {both[1]}, columns {both[2]} to {both[3]}",
        holds=both == (4, 15, 8, 19),
    )  # fmt: skip
    assert single == (8, 15, 8, 15)
    assert both == (4, 15, 8, 19)


SIDE, WINDOW, DIM = 16, 4, 32
PLAN = Plan(steps=300, batch=16, rate=2e-3)


class Painter(nn.Module):
    """Two blocks of attention that fill in what is hidden of an image."""

    def __init__(self, shifts: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        self.start = nn.Linear(2, DIM)
        self.positions = nn.Parameter(0.02 * torch.randn(SIDE**2, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        self.attentions = nn.ModuleList(DoubleAttention(DIM, 4, SIDE, WINDOW) for _ in range(2))
        for attention, pair in zip(self.attentions, shifts, strict=True):
            attention.branches = nn.ModuleList(WindowCore(2, SIDE, WINDOW, s) for s in pair)
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            for _ in range(2)
        )
        self.head = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x) + self.positions
        for i, (attention, network) in enumerate(zip(self.attentions, self.networks, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + network(self.norms[2 * i + 1](x))
        return self.head(x)[..., 0].unflatten(1, (SIDE, SIDE))


def pictures(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return smooth images, and what is seen of them: a tenth of the pixels, and which."""
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    images = F.interpolate(coarse, SIDE, mode="bicubic", align_corners=True)[:, 0]
    shown = (torch.rand(count, SIDE, SIDE, generator=generator) < 0.1).float()
    return torch.stack([images * shown, shown], dim=-1).flatten(1, 2), images


def filling(model: nn.Module, generator: Generator) -> Tensor:
    seen, images = pictures(PLAN.batch, generator)
    return F.mse_loss(model(seen), images)


def borders(error: Tensor) -> float:
    """Return how much errors jump at borders of windows, relative to elsewhere."""
    jumps = [error.diff(dim=axis).abs().movedim(axis, -1) for axis in (1, 2)]
    at = torch.arange(SIDE - 1) % WINDOW == WINDOW - 1
    return float(sum(j[..., at].mean() for j in jumps) / sum(j[..., ~at].mean() for j in jumps))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_double_attention_fills_in_better_than_windows(acceptance: Acceptance) -> None:
    kinds = {"double": ((0, 2), (0, 2)), "alternate": ((0, 0), (2, 2)), "straight": ((0, 0),) * 2}
    found = {}
    for name, shifts in kinds.items():
        model = train(lambda shifts=shifts: Painter(shifts), filling, PLAN, name)  # type: ignore[misc]
        seen, images = pictures(256, torch.Generator().manual_seed(99))
        with torch.no_grad():
            error = model(seen) - images
        found[name] = float(error.square().mean()), borders(error)
    (loss, jump), (naive, seams) = found["double"], found["straight"]
    acceptance(
        METHOD, 3, "At equal depth, a painter with double attention restores hidden pixels better"
        " than one with straight windows, and its errors jump less at borders.",
        naive="straight windows in all heads of both blocks",
        figure=f"error {loss:.4f} against {naive:.4f}, jumps at borders {jump:.3f} against"
        f" {seams:.3f} of those inside (Swin's turns: {found['alternate'][0]:.4f},"
        f" {found['alternate'][1]:.3f})",
        holds=loss < naive and jump < seams,
    )  # fmt: skip
    assert loss < naive


@pytest.mark.slow
def test_time_of_both_groups_at_64_pixels(acceptance: Acceptance) -> None:
    core = double(64, 8, 8, 8)
    given = [torch.randn(1, 16, 64**2, 32) for _ in range(3)]

    def seconds(call: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(7):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return sorted(times)[3]

    with torch.no_grad():
        torch.testing.assert_close(core(*given), halves(given, 8, 64, 8))
        ours, theirs = seconds(lambda: core(*given)), seconds(lambda: halves(given, 8, 64, 8))
    acceptance(
        METHOD, 4, "Both groups of heads at 64 x 64 pixels take 0.7 of the time of rolling, cutting"
        " and two attentions; here on a CPU, without a kernel of its own.",
        naive="roll, cut, two attentions, undo",
        figure=f"{1e3 * ours:.1f} against {1e3 * theirs:.1f} ms, {ours / theirs:.2f}",
        holds=ours <= 0.7 * theirs,
    )  # fmt: skip
