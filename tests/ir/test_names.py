"""Names of new tensors never clash, whatever the model calls its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.recognize import Linear
from blockwright.ir.regions import regions
from blockwright.ir.run import run
from blockwright.ir.verify import verify
from blockwright.passes import Canonicalize, FuseProjections, Pass, QuantizeWeights


class Formula(nn.Module):
    """A formula over named parameters."""

    def __init__(self, formula: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.formula = formula
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def square(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def check(model: nn.Module, passes: list[Pass[Any, Any]], tolerance: float) -> None:
    """Run passes without certificates, which must not be what catches a clash."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    program = capture(model.eval(), (x,))
    new, _ = run_passes(program, passes)
    verify(new)
    expected = run(program, [x])[0]
    assert (run(new, [x])[0] - expected).norm() <= tolerance * expected.norm()


def test_a_parameter_of_the_name_a_pass_would_give() -> None:
    formula = lambda s, x: F.linear(x, s.w, s.b).relu() + s.bias  # noqa: E731
    b, bias = 5 * square(1)[0], 5 * square(2)[0]
    model = Formula(formula, w=square(0), b=b, bias=bias)
    check(nn.Sequential(model), [QuantizeWeights()], 0.02)


def test_two_layers_of_one_module_in_two_passes() -> None:
    formula = lambda s, x: F.linear(F.linear(x, s.one).relu(), s.two)  # noqa: E731
    model = nn.Sequential(Formula(formula, one=square(0), two=square(1)))
    once = QuantizeWeights(include=("0",))
    check(model, [once, once], 0.05)


def test_a_module_of_the_joint_name() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v, self.k_v = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.k(x), self.v(x)], -1) + self.k_v(x.relu())

    check(Joint(), [FuseProjections()], 1e-6)


def test_a_weight_that_is_also_read_as_it_was() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    formula = lambda s, x: F.linear(x, s.w) + x @ s.w  # noqa: E731
    program = capture(Formula(formula, w=square(0)), (x,))
    doubled = Formula(lambda s, x: F.linear(x, s.w), w=2 * square(0))
    new = program.replace(program.regions(Linear)[0], doubled)
    verify(new)
    expected = F.linear(x, 2 * square(0)) + x @ square(0)
    torch.testing.assert_close(run(new, [x])[0], expected)


def test_tied_weights_keep_their_name_and_stay_tied() -> None:
    linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    linears[1].bias = linears[0].bias

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = linears

        def forward(self, x: Tensor) -> Tensor:
            return self.linears[1](self.linears[0](x).relu())

    check(Tied(), [QuantizeWeights()], 0.02)
    program = capture(Tied(), (torch.zeros(2, 4),))
    new, _ = run_passes(program, [QuantizeWeights()])
    assert [name for name in new.tensors if "bias" in name] == ["linears.0.bias"]


@pytest.mark.parametrize("late", ["mask", "value"])
def test_inputs_computed_after_a_region_began(late: str) -> None:
    def formula(s: Any, x: Tensor) -> Tensor:
        q = x[None, None]
        scores = (q @ q.transpose(2, 3)) * 0.5
        if late == "mask":
            scores = scores + (x @ x.T)[None, None]
        probs = torch.softmax(scores, dim=-1)
        value = q * 2 if late == "value" else q
        return probs @ value

    x = torch.randn(8, 4)
    program = capture(Formula(formula), (x,))
    new, _ = run_passes(program, [Canonicalize()], [[x]])
    assert any("scaled_dot_product" in str(node.target) for node in new.main.nodes)


def test_an_old_weight_may_come_back_under_another_name() -> None:
    class Swapped(nn.Module):
        """The new weight takes the old one's name; the old one is still read."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight * 2)
            self.old = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) - F.linear(x, self.old)

    model, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    program = capture(model, (x,))
    (region,) = regions(program, Linear)
    new = program.replace(region, Swapped(region.weight))
    verify(new)
    torch.testing.assert_close(run(new, [x]), run(program, [x]))
