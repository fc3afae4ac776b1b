"""Sorted experts against every expert computed for every token, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockwright.kernels.activations import FUNCTIONS
from blockwright.kernels.experts import Experts
from blockwright.kernels.moe_cpu import FEW, SortedExperts, by_expert, by_visit

SIZES = [(1, 4, 2), (3, 5, 1), (17, 4, 4), (40, 3, 2), (0, 3, 2), (5, 3, 0)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def experts(
    count: int, *, gated: bool, bias: bool, activation: str = "silu", dim: int = 6, ffn_dim: int = 5
) -> Experts:
    wide = [torch.randn(count, ffn_dim, dim) for _ in range(2)]
    biases = [torch.randn(count, ffn_dim) if bias else None for _ in range(2)]
    down, down_bias = torch.randn(count, dim, ffn_dim), torch.randn(count, dim) if bias else None
    gate, gate_bias = (wide[1], biases[1]) if gated else (None, None)
    return Experts(gate, wide[0], biases[0], gate_bias, down, down_bias, activation)


def routed(tokens: int, count: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.rand(tokens, count).topk(k, dim=-1).indices
    return torch.randn(tokens, 6), index, torch.randn(tokens, k)


def all_of_them(given: Experts, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Compute every expert for every token; multiply by zero where it was not asked."""
    count = len(given.up)
    wide = Experts(*(None if t is None else t.double() for t in given.tensors), given.activation)
    share = torch.zeros(len(x), count, dtype=torch.float64).scatter(1, index, weight.double())
    answers = torch.stack([wide.one(e).answer(x.double()) for e in range(count)], dim=1)
    return (answers * share[..., None]).sum(dim=1)


def near(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert value.shape == expected.shape
    assert (value.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("route", [by_expert, by_visit])
@pytest.mark.parametrize(("gated", "bias"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(("tokens", "count", "k"), SIZES[:4])
def test_both_ways_agree_with_all_experts(
    route: object, tokens: int, count: int, k: int, gated: bool, bias: bool
) -> None:
    given, inputs = experts(count, gated=gated, bias=bias), routed(tokens, count, k)
    near(route(given, *inputs), all_of_them(given, *inputs))  # type: ignore[operator]


@pytest.mark.parametrize(("dim", "ffn_dim"), [(8, 4), (6, 4), (8, 5)])
def test_products_of_any_width(dim: int, ffn_dim: int) -> None:
    given = experts(5, gated=True, bias=True, dim=dim, ffn_dim=ffn_dim)
    inputs = (torch.randn(20, dim), *routed(20, 5, 2)[1:])
    near(by_expert(given, *inputs), all_of_them(given, *inputs))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_activation(activation: str) -> None:
    given, inputs = experts(3, gated=True, bias=True, activation=activation), routed(9, 3, 2)
    near(SortedExperts(given)(*inputs), all_of_them(given, *inputs))


@pytest.mark.parametrize(("tokens", "count", "k"), SIZES)
def test_any_number_of_tokens_and_choices(tokens: int, count: int, k: int) -> None:
    given, inputs = experts(count, gated=False, bias=True), routed(tokens, count, k)
    near(SortedExperts(given)(*inputs), all_of_them(given, *inputs))


def test_leading_axes_stay() -> None:
    given, (x, index, weight) = experts(4, gated=True, bias=True), routed(24, 4, 2)
    y = SortedExperts(given)(*(t.reshape(2, 3, 4, -1) for t in (x, index, weight)))
    near(y, all_of_them(given, x, index, weight).reshape(2, 3, 4, 6))


@pytest.mark.parametrize("tokens", [FEW // 2, FEW])
def test_experts_nobody_visits_are_not_read(tokens: int) -> None:
    given, (x, _, weight) = experts(4, gated=False, bias=True), routed(tokens, 4, 2)
    index = torch.tensor([1, 3]).expand(tokens, 2)
    for tensor in given.tensors:
        if tensor is not None:
            tensor[0] = tensor[2] = torch.nan
    y = SortedExperts(given)(x, index, weight)
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [2, 30])
def test_types_are_kept(dtype: torch.dtype, tokens: int) -> None:
    given, (x, index, weight) = experts(4, gated=True, bias=True), routed(tokens, 4, 2)
    narrow = Experts(*(None if t is None else t.to(dtype) for t in given.tensors), given.activation)
    y = SortedExperts(narrow)(x.to(dtype), index, weight.to(dtype))
    assert y.dtype == dtype
    near(y, all_of_them(narrow, x.to(dtype), index, weight.to(dtype)), 8 * torch.finfo(dtype).eps)


def test_nan_of_a_router_stays_with_its_token() -> None:
    given, (x, index, weight) = experts(4, gated=False, bias=False), routed(20, 4, 2)
    weight[7] = torch.nan
    y = SortedExperts(given)(x, index, weight)
    assert y[7].isnan().all()
    assert y[torch.arange(20) != 7].isfinite().all()
