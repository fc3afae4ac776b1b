"""PT-DiT: a fresh block sees its windows alone, and then far beyond them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.models import pt_dit
from blockwright.models.pt_dit import TOY, Block, ProxyAttention, PTDiT, WindowAttention


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(1, 8, 8), (4, 4, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_a_mask(grid: tuple[int, int, int], shifted: bool) -> None:
    config = replace(TOY, grid=grid, window=(min(grid[0], 2), 4, 2))
    torch.manual_seed(0)
    module = WindowAttention(config, config.shift if shifted else (0, 0, 0))
    places = torch.cartesian_prod(*map(torch.arange, grid))
    shift = torch.tensor(config.shift if shifted else (0, 0, 0))
    window = (places - shift).div(torch.tensor(config.window), rounding_mode="floor")
    mask = (window[:, None] == window).all(-1)
    x = draw(2, len(places), 12)
    torch.testing.assert_close(module(x), module.attention(x, mask), atol=1e-6, rtol=1e-5)


def test_far_attention_tells_of_the_mean_of_each_window() -> None:
    torch.manual_seed(0)
    module = ProxyAttention(TOY)
    torch.nn.init.normal_(module.out.weight)
    x = draw(1, 16, 12)
    moved = x.clone()
    moved[0, 15] += 1  # in another window than token 0
    moved[0, 10] -= 1  # of the same window, so that its mean stays
    same = module(moved)[0, 0]
    torch.testing.assert_close(same, module(x)[0, 0])
    moved[0, 10] += 3 * torch.arange(12)
    assert not torch.allclose(module(moved)[0, 0], module(x)[0, 0])


def test_a_fresh_block_hides_proxies_and_shifted_windows() -> None:
    torch.manual_seed(0)
    block, text, parts = Block(TOY), draw(2, 3, 12), draw(2, 6, 12)
    without = Block(replace(TOY, shifted=False))
    without.load_state_dict(block.state_dict(), strict=False)
    x = draw(2, 16, 12)
    before = block(x, text, parts)
    torch.testing.assert_close(without(x, text, parts), before)
    torch.nn.init.normal_(block.far.among.qkv.weight)
    assert torch.equal(block(x, text, parts), before)


def test_patches_go_back_where_they_came_from() -> None:
    torch.manual_seed(0)
    model = PTDiT(replace(TOY, grid=(2, 4, 6), depth=0))
    x = draw(1, 4, 2, 8, 12)
    moved = x.clone()
    moved[0, :, 1, 2:4, 6:8] += draw(4, 2, 2)  # one patch
    _, text, time = model.example_inputs(1)
    apart = (model(moved, text, time) - model(x, text, time)).abs().sum(1)[0]
    inside = F.pad(torch.ones(2, 2), (6, 4, 2, 4)).bool()
    assert (apart[1][inside] > 0).all()
    assert not apart[1][~inside].any()
    assert not apart[0].any()


def test_published_widths() -> None:
    for config in (pt_dit.PT_DIT_S, pt_dit.PT_DIT_B, pt_dit.PT_DIT_L, pt_dit.PT_DIT_XL):
        assert config.dim % config.heads == 0
        assert config.ffn_dim == 4 * config.dim
        assert config.counts == (1, 8, 8)
