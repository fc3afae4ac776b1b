"""Networks in experts are sublayers like others: found, named, counted, left to later passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts, Linear, Projections


class Block(nn.Module):
    """A residual network in experts as a model would have it, with norm, gate and scale."""

    def __init__(self, shared: bool, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.router = nn.Linear(8, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 3, 8)), nn.Parameter(torch.randn(4, 8, 3))
        self.bias = nn.Parameter(torch.randn(8)) if bias else None
        self.shared = nn.Sequential(nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 8)) if shared else None
        self.gate = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weight, index = torch.topk(self.router(y).softmax(-1), 2)
        routed = torch.ops.blockwright.moe_ffn(
            y, index, weight * 2, None, self.up, None, None, self.down, None, "silu"
        )
        if self.bias is not None:
            routed = routed + self.bias
        if self.shared is not None:
            routed = routed + self.shared(y)
        return x + self.gate * routed


def captured(shared: bool, bias: bool) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(shared, bias) for _ in range(2))).eval()
    return bw.capture(model, (torch.randn(2, 5, 8),))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_found_as_a_sublayer(shared: bool, bias: bool) -> None:
    program = captured(shared, bias)
    found = program.regions(Experts)
    assert [region.constants() for region in found] == 2 * [
        {
            "activation": "silu", "is_gated": False, "dim": 8, "experts": 4, "active": 2,
            "ffn_dim": 3, "shared_ffn_dim": 5 if shared else 0,
        }
    ]  # fmt: skip
    assert not program.feed_forwards()
    for block in program.blocks():
        assert [sublayer.region.kind for sublayer in block.sublayers] == ["experts"]
        assert block.experts[0].ffn_dim == 3
        assert len(block.inputs) == 1
        assert block.norm_place == "pre"
        assert block.gate_kinds == ("parameter",)
    region = found[0]
    assert region.router is not None
    assert torch.equal(region.router.weight, program.tensors["0.router.weight"])
    assert region.is_weighted
    assert (region.bias is not None) == bias
    assert set(region.weights()) == {"up", "down"}
    assert (region.shared_up is not None) == shared


def test_what_it_computes() -> None:
    program = captured(True, True)
    region = program.regions(Experts)[0]
    x = torch.randn(3, 8)
    held = {name: program.tensors[f"0.{name}"] for name in ("router.weight", "up", "down", "bias")}
    weight, index = torch.topk(F.linear(x, held["router.weight"]).softmax(-1), 2)
    y = F.linear(F.silu(F.linear(x, region.shared_up.weight, region.shared_up.bias)),
                 region.shared_down.weight, region.shared_down.bias) + held["bias"]  # fmt: skip
    for row in range(3):
        for choice in range(2):
            expert = index[row, choice]
            hidden = F.silu(held["up"][expert] @ x[row])
            y[row] += 2 * weight[row, choice] * (held["down"][expert] @ hidden)
    torch.testing.assert_close(region.replay([x.expand(1, 3, 8)])[0][0], y)


def test_everything_has_an_owner() -> None:
    account = captured(True, False).explain()
    shares = {share.owner: share for share in account.shares}
    assert shares["experts"].regions == 2
    assert shares["experts"].parameters == 2 * (32 + 96 + 96 + 45 + 48)
    assert not account.near_misses
    assert not [owner for owner in shares if owner.startswith("outside")]


def test_a_token_is_multiplied_with_a_part() -> None:
    program = captured(False, False)
    cost = program.cost()
    assert cost.parameters - cost.activated_parameters == 2 * 96 * 2 * 2 // 4


def test_routers_are_told_from_other_layers() -> None:
    program = captured(True, False)
    assert [layer.label for layer in program.regions(Linear) if layer.is_router] == [
        "0.router", "1.router"
    ]  # fmt: skip
    assert not program.regions(Projections)  # the shared expert reads the same value
