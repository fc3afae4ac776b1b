"""DiT-3D: voxels there and back, windows that keep samples apart, and the start from images."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.models import dit, dit3d, voxels
from blockwright.models.dit3d import TOY, DiT3D, transfer


def cloud(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_voxels_hold_the_mean_of_their_points() -> None:
    points = cloud(2, 3, 40)
    places = voxels.voxel_places(points, 4)
    grid = voxels.voxelize(points, places, 4)
    expected = torch.zeros(2, 3, 4, 4, 4)
    for sample in range(2):
        held: dict[tuple[int, ...], list[Tensor]] = {}
        for point, place in zip(points[sample].T, places[sample].round().long().T, strict=True):
            held.setdefault(tuple(place.tolist()), []).append(point)
        for (x, y, z), some in held.items():
            expected[sample, :, x, y, z] = torch.stack(some).mean(0)
    torch.testing.assert_close(grid, expected)


def test_points_read_a_linear_field_between_voxels() -> None:
    x, y, z = torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")
    field = torch.stack([x + 2 * y, z - y, 3 * z])[None]
    places = 3 * torch.rand(1, 3, 20, generator=torch.Generator().manual_seed(0))
    a, b, c = places[0]
    torch.testing.assert_close(
        voxels.devoxelize(field, places)[0], torch.stack([a + 2 * b, c - b, 3 * c])
    )


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_windows_are_a_mask_of_blocks(batch: int) -> None:
    config = replace(TOY, voxels=8)  # 4 x 4 x 4 patches, windows of 2 x 2 x 2
    torch.manual_seed(0)
    windowed, whole = dit3d.Block(config, config.side), dit3d.Block(config)
    whole.load_state_dict(windowed.state_dict())
    places = torch.cartesian_prod(*[torch.arange(4)] * 3) // 2
    mask = (places[:, None] == places).all(-1)
    x = cloud(batch, 64, config.dim)

    def masked(x: Tensor) -> Tensor:
        q, k, v = whole.attention.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return whole.attention.out(y.transpose(1, 2).flatten(2))

    torch.testing.assert_close(windowed.attend(x), masked(x), atol=1e-6, rtol=1e-5)


def test_one_window_is_attention_among_all() -> None:
    config = replace(TOY, window=4, windowed=(0, 1, 2))
    torch.manual_seed(0)
    windowed, whole = DiT3D(config), DiT3D(replace(config, windowed=()))
    for parameter in windowed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.load_state_dict(windowed.state_dict())
    inputs = windowed.example_inputs()
    torch.testing.assert_close(windowed(*inputs), whole(*inputs), atol=1e-5, rtol=1e-4)


def images() -> dit.DiT:
    torch.manual_seed(1)
    model = dit.DiT(dit.DiTConfig(latent=8, patch=2, channels=3, classes=1, dim=12, heads=2,
                                  depth=3, ffn_dim=16))  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_blocks_come_from_a_dit_of_images() -> None:
    source, model = images(), DiT3D(TOY)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    report = transfer(source.state_dict(), model)
    blocks = [name for name in before if name.startswith("blocks.")]
    assert report.copied == blocks
    assert report.skipped == [name for name in before if name not in blocks]
    assert not report.mismatched
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in report.skipped)
    x, condition = cloud(2, 16, 12), cloud(2, 12)
    theirs, ours = source.blocks[1](x, condition), model.blocks[1](x, condition)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-2)  # they differ in their gelu


def test_what_does_not_fit_is_named_and_kernels_may_be_inflated() -> None:
    source = images()
    wide = DiT3D(replace(TOY, ffn_dim=20))
    report = transfer(source.state_dict(), wide)
    assert {name.split(".", 2)[2] for name in report.mismatched} == {
        "up.weight", "up.bias", "down.weight"
    }  # fmt: skip
    model = DiT3D(TOY)
    report = transfer(source.state_dict(), model, ("blocks.*.attention.*",), inflate=True)
    assert "patchify.weight" in report.copied
    assert "blocks.0.up.weight" in report.skipped
    flat, deep = source.patchify.weight, model.patchify.weight
    torch.testing.assert_close(deep.sum(2), flat)
    assert torch.equal(deep[:, :, 0], deep[:, :, 1])


def test_positions_are_three_thirds() -> None:
    waves = dit3d.grid_waves(3, 12).view(3, 3, 3, 12)
    x, y, z = waves.chunk(3, dim=-1)
    assert torch.equal(x[:, 0, 0], y[0, :, 0])
    assert torch.equal(x[:, 0, 0], z[0, 0])
    assert torch.equal(x[1], x[1, :1, :1].expand(3, 3, 4))
    assert math.isclose(x[1, 0, 0, 0], math.sin(1), rel_tol=1e-6)
