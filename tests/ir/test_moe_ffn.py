"""Routing through experts: what it means, its gradients, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from blockwright.driver.account import Meter
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.ops.activations import ACTIVATIONS
from blockwright.ir.program import Program
from blockwright.ir.run import run

OP = torch.ops.blockwright.moe_ffn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(
    *, gated: bool = True, bias: bool = True, tokens: tuple[int, ...] = (2, 3), k: int = 2
) -> list[Tensor | None]:
    """Four experts of 5 neurons on rows of 6, in fp64."""

    def make(*shape: int, there: bool = True) -> Tensor | None:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True) if there else None

    index = torch.rand(*tokens, 4).topk(k, dim=-1).indices
    return [
        make(*tokens, 6), index, make(*tokens, k), make(4, 5, 6, there=gated), make(4, 5, 6),
        make(4, 5, there=bias), make(4, 5, there=bias and gated), make(4, 6, 5),
        make(4, 6, there=bias),
    ]  # fmt: skip


def test_one_expert_is_a_feed_forward_network() -> None:
    x, up, down = torch.randn(3, 6), torch.randn(1, 5, 6), torch.randn(1, 6, 5)
    index, weight = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[1.0], [2.0], [0.0]])
    y = OP(x, index, weight, None, up, None, None, down, None, "gelu")
    torch.testing.assert_close(y, F.gelu(x @ up[0].t()) @ down[0].t() * weight)


@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_with_unit_weight_are_the_dense_network(gated: bool) -> None:
    x, _, _, gate, up, up_bias, gate_bias, down, _ = arguments(gated=gated, k=4)
    assert isinstance(x, Tensor)
    assert isinstance(up, Tensor)
    assert isinstance(up_bias, Tensor)
    assert isinstance(down, Tensor)
    everyone = torch.arange(4).expand(2, 3, 4)
    ones = torch.ones(2, 3, 4, dtype=x.dtype)
    hidden = F.linear(x, up.flatten(0, 1), up_bias.flatten())
    if gate is None or gate_bias is None:
        hidden = F.silu(hidden)
    else:
        hidden = F.silu(F.linear(x, gate.flatten(0, 1), gate_bias.flatten())) * hidden
    dense = hidden @ down.transpose(1, 2).flatten(0, 1)
    y = OP(x, everyone, ones, gate, up, up_bias, gate_bias, down, None, "silu")
    torch.testing.assert_close(y, dense)


def test_experts_and_router_permuted_together_change_nothing() -> None:
    x, index, weight, *experts = arguments()
    order = torch.tensor([2, 0, 3, 1])
    moved = [None if t is None else t[order] for t in experts]
    renamed = order.argsort()[index]
    expected = OP(x, index, weight, *experts, "silu")
    torch.testing.assert_close(OP(x, renamed, weight, *moved, "silu"), expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str, gated: bool) -> None:
    given = arguments(gated=gated, tokens=(3,))
    assert torch.autograd.gradcheck(lambda *tensors: OP(*tensors, activation), given)


@pytest.mark.parametrize("bias", [True, False])
def test_registration_is_sound_for_training(bias: bool) -> None:
    torch.library.opcheck(OP.default, (*arguments(bias=bias), "silu"))


@pytest.mark.parametrize(("tokens", "k"), [((0,), 2), ((), 2), ((3,), 0)])
def test_nothing_to_do(tokens: tuple[int, ...], k: int) -> None:
    y = OP(*arguments(tokens=tokens, k=k), "gelu")
    assert y.shape == (*tokens, 6)
    assert bool(y.detach().any()) == (tokens == ())


def test_sums_are_taken_in_single_precision() -> None:
    half = [None if t is None else t.detach() for t in arguments(k=4)]
    half = [t.half() if t is not None and t.is_floating_point() else t for t in half]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in half]
    y, expected = OP(*half, "silu"), OP(*wide, "silu")
    assert y.dtype == torch.float16
    assert (y - expected).norm() < 2e-3 * expected.norm()


def test_an_unknown_activation_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index, weight = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
            matrix = torch.ones(1, 4, 4)
            return OP(x, index, weight, None, matrix, None, None, matrix, None, "swish")

    with pytest.raises(Exception, match="activation='swish' is unknown") as caught:
        capture(Wrong(), torch.randn(2, 4))
    assert isinstance(caught.value, OptionError) or caught.value.__cause__ is not None


class Routed(nn.Module):
    """A router and six experts of width 8 on rows of 8, of which a token visits two."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(6, 4, 8)), nn.Parameter(torch.randn(6, 8, 4))
        self.down_bias = nn.Parameter(torch.randn(6, 8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, -1)
        experts = (None, self.up, None, None, self.down, self.down_bias)
        return OP(x, index, weight, *experts, "relu")


@pytest.fixture(scope="module")
def routed() -> Program:
    torch.manual_seed(0)
    return capture(Routed(), torch.randn(5, 8), dynamic_shapes=({0: Dim("tokens", min=1)},))


def test_cost_counts_what_is_activated(routed: Program) -> None:
    cost = routed.cost({"tokens": 10})
    stored = 6 * (4 * 8 + 8 * 4 + 8)
    assert cost.parameters == 6 * 8 + stored
    assert cost.activated_parameters == 6 * 8 + stored * 2 // 6
    visits = 10 * 2
    assert cost.by_kind["linear"] == 2 * 10 * 8 * 6 + visits * 2 * (4 * 8 + 8 * 4)


def test_a_run_activates_what_is_predicted(routed: Program) -> None:
    meter = Meter(routed)
    run(routed, [torch.randn(10, 8)], on_node=meter.saw)
    counts, cost = meter.counts(), routed.cost({"tokens": 10})
    names = ("parameters", "activated_parameters", "flops", "bytes_moved")
    assert {n: counts[n] for n in names} == {n: getattr(cost, n) for n in names}


def test_shared_experts_are_idle_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Routed(bias=False)

        def forward(self, x: Tensor) -> Any:
            return self.experts(self.experts(x))

    cost = capture(Twice(), torch.randn(5, 8)).cost()
    assert cost.activated_parameters == 6 * 8 + 2 * (4 * 8 + 8 * 4)


def test_the_text_names_what_is_called(routed: Program) -> None:
    line = next(line for line in routed.text().splitlines() if "moe_ffn(" in line)
    assert "down_bias, relu)" in line
    assert "f32[tokens, 8]" in line
