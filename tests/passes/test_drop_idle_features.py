"""Features that nobody reads are cut, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.passes import DropIdleFeatures


def test_features_that_are_read_stay(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [DropIdleFeatures(allow_no_match=True)], [[tokens]])
    assert not step.receipt.changed


class Fused(nn.Module):
    """Of three parts of a layer, the first and the last are read."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 12, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        one, _, two = self.layer(x).unflatten(-1, (3, 2, 2)).unbind(-3)
        return one * two


@pytest.mark.parametrize("bias", [True, False])
def test_idle_golden(bias: bool, golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    program = bw.capture(Fused(bias).eval(), (torch.randn(2, 3, 4),))
    x = torch.randint(-3, 4, (2, 3, 4)).float()
    new, (step,) = run_passes(program, [DropIdleFeatures()], [[x]])
    if bias:
        golden("drop_idle_features", f"# {step.pass_}: {step.receipt}\n{new.text()}")
    assert new.tensors["layer.weight"].shape == (8, 4)
    assert torch.allclose(run(new, [x])[0], run(program, [x])[0], atol=1e-6)


def test_what_is_not_followed_stays() -> None:
    class Whole(Fused):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[..., :4] * y.sum()

    program = bw.capture(Whole(True).eval(), (torch.randn(2, 3, 4),))
    new, _ = run_passes(program, [DropIdleFeatures(allow_no_match=True)])
    assert new is program


def test_an_excluded_layer_stays() -> None:
    program = bw.capture(Fused(True).eval(), (torch.randn(2, 3, 4),))
    pass_ = DropIdleFeatures(exclude=("layer",), allow_no_match=True)
    _, (step,) = run_passes(program, [pass_])
    assert step.plan.skips == {"layer": "is excluded by pattern"}
