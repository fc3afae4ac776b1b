"""LEGO: bricks map regions, chains end anywhere, canvases are of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.models import lego
from blockwright.models.lego import Lego, cut, denoise, fold, places


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = Lego(lego.TOY).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_fresh_brick_returns_zeros() -> None:
    fresh = Lego(lego.TOY)
    assert not fresh(*fresh.example_inputs()).any()


def test_models_without_labels_take_none() -> None:
    with torch.device("meta"):
        plain = Lego(lego.S_PG_64)
        inputs = plain.example_inputs()
        assert len(inputs) == 2
        assert plain(*inputs).shape == (2, 3, 64, 64)


def test_what_is_cut_is_folded_back() -> None:
    x = pixels(2, 3, 8, 12)
    regions, rows, columns = cut(x, 4)
    assert (rows, columns) == (2, 3)
    assert torch.equal(regions[4], x[0, :, 4:, 4:8])
    patches = regions.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1)
    assert torch.equal(fold(patches.flatten(3).flatten(1, 2), 2, 2, rows, columns), x)


def test_places_are_those_of_columns_and_rows() -> None:
    found = places(pixels(1, 3, 2, 3))
    assert found[0, 0].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert found[0, 1].tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_a_brick_left_out_hands_on_what_it_got(model: Any) -> None:
    chain = Lego(lego.LegoConfig(8, classes=5, dim=8, heads=2, bricks=(*lego.TOY.bricks,) * 2))
    for parameter in chain.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = chain.example_inputs()
    full = chain.estimates(*inputs)
    assert len(full) == 4
    first, last = chain.estimates(*inputs, skipped=(1, 2))
    assert torch.equal(first, full[0])
    image = torch.cat((first, inputs[0], places(inputs[0])), dim=1)
    condition = chain.noise(lego.time_waves(inputs[1], 256)) + chain.labels(inputs[2])
    assert torch.equal(last, chain.bricks[3](image, condition))


def test_a_region_depends_on_itself_alone(model: Any) -> None:
    brick, condition = model.bricks[1], pixels(1, 8)  # regions of 4
    x = pixels(1, 10, 8, 8)
    changed = x.clone()
    changed[..., :4, 4:] += 1
    same = brick(x, condition) == brick(changed, condition)
    assert not same[..., :4, 4:].any()
    assert same[..., 4:, :].all()
    assert same[..., :4, :4].all()


def test_a_brick_is_whole_on_a_wider_image(model: Any) -> None:
    condition = pixels(1, 8)
    for brick, features in zip(model.bricks, (6, 10), strict=True):
        left, right = pixels(2, features, 8, 8).split(1)
        wide = brick(torch.cat((left, right), dim=3), condition)
        parts = brick(left, condition), brick(right, condition)
        torch.testing.assert_close(wide, torch.cat(parts, dim=3))


def test_denoising_keeps_what_has_no_noise_and_distrusts_what_has_much() -> None:
    x, estimate = pixels(3, 1, 2, 2), pixels(3, 1, 2, 2)
    seen: list[Tensor] = []

    def model(scaled: Tensor, level: Tensor) -> Tensor:
        seen.extend((scaled, level))
        return torch.stack((estimate, 2 * estimate))

    first, second = denoise(model, x, torch.tensor([1e-6, 0.5, 1e6]))
    torch.testing.assert_close(first[0], x[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[2], estimate[2] / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[1], x[1] / 2 + estimate[1] / 8**0.5)
    torch.testing.assert_close(second[1] - first[1], estimate[1] / 8**0.5)
    torch.testing.assert_close(seen[0][1], x[1] / 0.5**0.5)
    torch.testing.assert_close(seen[1], torch.tensor([1e-6, 0.5, 1e6]).log() / 4)
