"""StyleSwin: what its norms, windows and doublings do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.models import styleswin
from blockwright.models.styleswin import DoubleAttention, StyledNorm, StyleSwinConfig


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_widths_and_heads() -> None:
    for config, widths, heads in [
        (styleswin.STYLESWIN_1024, (512, 512, 512, 512, 256, 128, 64, 32, 16), (16, 8, 4, 4)),
        (styleswin.STYLESWIN_256, (512, 512, 512, 512, 512, 256, 128), (16, 16, 8, 4)),
    ]:
        assert tuple(map(config.width, config.sizes)) == widths
        assert tuple(map(config.heads, (32, 64, 128, 256))) == heads


def test_norms_put_each_channel_on_what_the_style_asks_for() -> None:
    norm = StyledNorm(4, 3)
    style = draw(2, 3)
    y = norm(draw(2, 50, 4) * 3 + 5, style)
    factor, shift = norm.modulation(style).chunk(2, dim=-1)
    torch.testing.assert_close(y.mean(1), shift, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(y.std(1, correction=0), factor.abs(), atol=1e-4, rtol=1e-3)


def by_hand(attention: DoubleAttention, x: Tensor, window: int, shift: int) -> Tensor:
    """Attend under masks of all pixels by all pixels, with biases where pixels meet."""
    side, half = attention.side, x.shape[-1] // 2
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    parts = []
    for index, (branch, moved) in enumerate(zip(attention.branches, (0, shift), strict=True)):
        place = torch.stack([row - moved, column - moved]).div(window, rounding_mode="floor")
        mask = (place[:, :, None] == place[:, None]).all(0)
        apart = (row[:, None] - row + window - 1) * (2 * window - 1)
        apart = apart + column[:, None] - column + window - 1
        bias = branch.bias[apart.where(mask, 0)].permute(2, 0, 1).masked_fill(~mask, -torch.inf)
        share = [t[..., index * half : (index + 1) * half] for t in (q, k, v)]
        heads = [t.unflatten(-1, (branch.heads, -1)).transpose(1, 2) for t in share]
        y = F.scaled_dot_product_attention(*heads, attn_mask=bias)
        parts.append(y.transpose(1, 2).flatten(2))
    return attention.out(torch.cat(parts, dim=-1))


@pytest.mark.parametrize(("side", "window"), [(8, 8), (16, 8), (8, 4)])
def test_half_of_the_heads_see_shifted_windows(side: int, window: int) -> None:
    torch.manual_seed(0)
    attention = DoubleAttention(8, 4, side, window)
    shift = window // 2 if side > window else 0
    x = draw(2, side**2, 8)
    torch.testing.assert_close(
        attention(x), by_hand(attention, x, window, shift), atol=1e-5, rtol=1e-4
    )


def test_positions_begin_without_strength() -> None:
    grow = styleswin.Upsample(8, 4, 2)
    x = draw(2, 4, 8)
    image = F.interpolate(x.mT.unflatten(2, (2, 2)), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(grow(x), grow.reduce(grow.norm(image.flatten(2).mT)))
    with torch.no_grad():
        grow.strength.fill_(2)
    assert not torch.allclose(grow(x), grow.reduce(grow.norm(image.flatten(2).mT)))


def test_colours_are_doubled_smoothly() -> None:
    flat = styleswin.smooth_double(torch.ones(1, 3, 6, 6))
    assert flat.shape == (1, 3, 12, 12)
    torch.testing.assert_close(flat[:, :, 1:-1, 1:-1], torch.ones(1, 3, 10, 10))
    slope = styleswin.smooth_double(torch.arange(6.0).expand(1, 1, 6, 6))[0, 0, 5, 2:-2]
    torch.testing.assert_close(slope.diff(), torch.full((7,), 0.5))


def test_sizes_follow_the_image() -> None:
    assert StyleSwinConfig(image=32).sizes == (4, 8, 16, 32)
