"""The reference runner: other precisions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.ir.capture import capture
from blockwright.ir.run import run


class Grid(nn.Module):
    """Joins positions made out of nothing with some that are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor([0.1, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(self.rows, torch.arange(3.0), indexing="ij")
        return x + rows + columns


def test_what_is_made_of_no_tensor_has_the_precision_asked_for() -> None:
    x = torch.zeros(2, 3)
    (found,) = run(capture(Grid(), (x,)), [x], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, Grid()(x).double())


class Third(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(1.0, 2.0) / 3


def test_the_arithmetic_is_done_in_that_precision() -> None:
    x = torch.zeros(1)
    (found,) = run(capture(Third(), (x,)), [x], dtype=torch.float64)
    assert found.item() == 1 / 3
