"""DLGSANet: convolutions with weights of pixels, attention of channels, tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import blockwright as bw
from blockwright.ir.run import run
from blockwright.models import dlgsanet
from blockwright.models.dlgsanet import DLGSANet, dynamic_conv, starts, tiled


@pytest.mark.parametrize("tile", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_the_program_is_the_module(tile: int | None) -> None:
    torch.manual_seed(0)
    model = DLGSANet(replace(dlgsanet.TOY, depth=1, tile=tile)).eval()
    inputs = model.example_inputs()
    with torch.no_grad():
        expected = model(*inputs)
    assert expected.shape == (2, 3, 16, 16)
    torch.testing.assert_close(run(bw.capture(model, inputs), list(inputs))[0], expected)


def test_dynamic_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 9, 6), torch.randn(2, 4, 7, 7, 9, 6)
    seen = F.unfold(x, 7, padding=3).unflatten(1, (4, 2, 49))
    expected = (seen * weight.flatten(2, 3).flatten(3)[:, :, None]).sum(3).flatten(1, 2)
    torch.testing.assert_close(dynamic_conv(x, weight).flatten(2), expected, atol=1e-5, rtol=1e-5)


def test_the_same_weights_everywhere_are_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 8, 9, 6), torch.randn(4, 7, 7)
    everywhere = kernel[None, ..., None, None].expand(-1, -1, -1, -1, 9, 6)
    plain = F.conv2d(x, kernel.repeat_interleave(2, 0)[:, None], padding=3, groups=8)
    torch.testing.assert_close(dynamic_conv(x, everywhere), plain, atol=1e-5, rtol=1e-5)


def test_a_temperature_scales_rectified_attention() -> None:
    torch.manual_seed(0)
    attention = dlgsanet.ChannelAttention(dlgsanet.TOY)
    x = torch.randn(1, 8, 6, 6)
    before = attention(x)
    with torch.no_grad():
        attention.temperature.mul_(3)
    torch.testing.assert_close(attention(x), 3 * before)


def test_tiles() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, 8)
    centred = lambda part: part - part.mean((2, 3), keepdim=True)  # noqa: E731
    assert torch.equal(tiled(centred, x, 8), centred(x))
    assert torch.equal(tiled(centred, x, 99), centred(x))
    four = tiled(centred, x, 4)
    assert torch.equal(four[:, :, :4, 4:], centred(x[:, :, :4, 4:]))
    torch.testing.assert_close(tiled(lambda part: part, x, 5), x)


def test_tiles_cover_the_image() -> None:
    assert starts(100, 48) == [0, 26, 52]
    assert starts(48, 48) == [0]
    for side in range(1, 40):
        for tile in range(1, side + 1):
            begins = starts(side, tile)
            covered = {p for b in begins for p in range(b, b + tile)}
            assert covered == set(range(side))
