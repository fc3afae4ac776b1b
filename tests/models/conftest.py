"""What tests of agreement with other libraries share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

# Our name, a pattern, and after it theirs; several of theirs are stacked.
Names = Sequence[tuple[str, ...]]


@pytest.fixture
def draw_weights() -> Callable[[nn.Module], nn.Module]:
    """Draw weights large enough for every part to show in the output."""

    def draw(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return draw


@pytest.fixture
def copy_weights() -> Callable[[Mapping[str, Tensor], nn.Module, Names], None]:
    """Fill every parameter of ours; every tensor of the source must be used."""

    @torch.no_grad()
    def copy(source: Mapping[str, Tensor], ours: nn.Module, names: Names) -> None:
        used = set()
        for name, parameter in ours.named_parameters():
            pattern, *theirs = next(row for row in names if re.fullmatch(row[0], name))
            full = [re.sub(pattern, target, name) for target in theirs]
            stacked = torch.cat([source[key] for key in full])
            assert stacked.shape == parameter.shape, name
            parameter.copy_(stacked)
            used.update(full)
        assert used == set(source)

    return copy


@pytest.fixture
def assert_agree() -> Callable[[Tensor, Tensor], None]:
    """Compare outputs; the largest difference relative to the largest value."""

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-4, f"relative error {error:.1e}"

    return check
