"""Hashing by signs: the order of bits, both scores, their gradient, and tables read on a CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from blockwright.kernels.hash_cpu import HashedTables
from blockwright.kernels.hashing import SCORES, hashed, rows_of, score_gradient


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_hand(z: list[float], score: str) -> tuple[int, float]:
    """Code and score of one chunk, from the probability of its sign vector among all."""
    code = int("".join("1" if value >= 0 else "0" for value in z), 2)
    vectors = list(itertools.product((-1, 1), repeat=len(z)))
    weights = [math.exp(sum(a * b for a, b in zip(z, t, strict=True))) for t in vectors]
    sure = weights[code] / sum(weights)
    return code, sure * sum(map(abs, z)) if score == "l1_softmax" else sure


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_codes_and_scores(bits: int, score: str) -> None:
    x = torch.randn(5, 2 * bits, dtype=torch.float64)
    x[0, 0], x[1, -1] = 0.0, -0.0  # zero counts as positive
    code, weight = hashed(x, bits, score)
    for row in range(5):
        for table in range(2):
            z = x[row, table * bits : (table + 1) * bits].tolist()
            assert (int(code[row, table]), float(weight[row, table])) == pytest.approx(
                by_hand(z, score)
            )


def test_scaling_keeps_a_code_and_a_flip_changes_its_bit() -> None:
    x = torch.randn(7, 5)
    code, _ = hashed(x, 5, "softmax")
    assert torch.equal(hashed(3.7 * x, 5, "softmax")[0], code)
    for place in range(5):
        flipped = x.clone()
        flipped[:, place] *= -1
        change = (hashed(flipped, 5, "softmax")[0] - code).abs()
        assert (change == 2 ** (4 - place)).all()


@pytest.mark.parametrize("score", SCORES)
def test_the_gradient_of_scores(score: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 2, dtype=torch.float64)
    _, weight = hashed(x, 3, score)
    (expected,) = torch.autograd.grad(weight, x, grad)
    torch.testing.assert_close(score_gradient(grad, x.detach(), 3, score), expected)


def test_scores_of_half_precision_are_taken_in_single() -> None:
    x = torch.full((1, 10), 60_000.0, dtype=torch.float16)
    _, weight = hashed(x, 10, "l1_softmax")
    assert weight.dtype == torch.float32
    assert float(weight) == pytest.approx(10 * float(x[0, 0]))


def test_rows_stand_below_each_other() -> None:
    assert rows_of(torch.tensor([[3, 0, 1]]), 2).tolist() == [[3, 4, 9]]


def tables(count: int, bits: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 2**bits, features).to(dtype)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(2, 3, 12), (12,), (0, 12), (1, 12)])
def test_the_cpu_path_agrees_with_the_op(shape: tuple[int, ...], score: str) -> None:
    x, given, bias = torch.randn(shape), tables(4, 3, 7), torch.randn(7)
    for offset in (None, bias):
        y = HashedTables(given, offset, score)(x)
        expected = torch.ops.blockwright.hash_linear(x, given, offset, score)
        assert y.shape == (*shape[:-1], 7)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(dtype: torch.dtype) -> None:
    x, given = torch.randn(5, 6).to(dtype), tables(2, 3, 4, dtype)
    y = HashedTables(given, None, "softmax")(x)
    expected = torch.ops.blockwright.hash_linear(x.double(), given.double(), None, "softmax")
    assert y.dtype == dtype
    assert (y - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


def test_rows_nobody_addresses_are_not_read() -> None:
    given = tables(1, 2, 3)
    given[0, 1:3] = torch.nan
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert HashedTables(given, None, "softmax")(x).isfinite().all()


def test_nan_stays_with_its_token() -> None:
    x = torch.randn(4, 6)
    x[2, 1] = torch.nan
    y = HashedTables(tables(2, 3, 5), None, "l1_softmax")(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()
