"""`block_attention` against all scores and a mask, forwards and backwards; and parts that merge."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.ir.ops.block_attention import OP, flops, reference
from blockwright.passes.shared.partial_attention import Partial, attend, merge

CASES = 40


def drawn(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, float, bool]:
    """Any sizes: ragged last blocks, several queries per key head, rows that see nothing."""
    draw = random.Random(number)
    torch.manual_seed(number)
    kv_heads, batch = draw.choice((1, 2, 3)), draw.choice((1, 2))
    heads, head_dim = kv_heads * draw.choice((1, 2)), draw.choice((4, 8))
    queries, keys = draw.randint(1, 40), draw.randint(1, 40)
    query_block, key_block = draw.randint(1, 12), draw.randint(1, 12)
    many = -(-queries // query_block), -(-keys // key_block)
    shared = draw.choice((1, batch)), draw.choice((1, heads))
    blocks = torch.rand(*shared, *many).argsort(-1)[..., : draw.randint(0, many[1])]
    blocks = blocks.where(torch.rand(blocks.shape) > draw.choice((0.0, 0.3)), -1)
    q = torch.randn(batch, heads, queries, head_dim).double()
    k = torch.randn(batch, kv_heads, keys, head_dim).double()
    v = torch.randn(batch, kv_heads, keys, draw.choice((head_dim, 5))).double()
    given = (t.requires_grad_() for t in (q, k, v))
    return (*given, blocks, query_block, key_block, 0.3, draw.random() < 0.4)


@pytest.mark.parametrize("number", range(CASES))
def test_results_and_gradients_are_those_of_the_reference(number: int) -> None:
    given = drawn(number)
    found, expected = OP(*given), reference(*given)
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(value) for value in expected]

    def loss(values: tuple[Tensor, Tensor]) -> Tensor:
        out, lse = values
        seen = torch.where(lse.isfinite(), lse, 0.0)
        return (out * weights[0]).sum() + (seen * weights[1]).sum()

    ours = torch.autograd.grad(loss(found), given[:3])
    theirs = torch.autograd.grad(loss(expected), given[:3])
    for value, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, right.nan_to_num(0.0))  # of rows that see nothing


def test_blocks_that_are_not_listed_are_not_read() -> None:
    q, k, v = torch.randn(3, 1, 2, 10, 8)
    k[..., 4:8, :] = v[..., 4:8, :] = torch.nan
    blocks = torch.tensor([[0, 2], [2, -1]])[None, None]
    assert all(value.isfinite().all() for value in OP(q, k, v, blocks, 5, 4, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_exact_whatever_the_type(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 16).to(dtype)
    blocks = torch.rand(1, 2, 4, 4).topk(2).indices
    out, lse = OP(q, k, v, blocks, 16, 16, 0.25)
    expected = reference(q.double(), k.double(), v.double(), blocks, 16, 16, 0.25)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (out - expected[0]).norm() < tolerance * expected[0].norm()
    assert (lse - expected[1]).norm() < tolerance * expected[1].norm()


def test_parts_merge_to_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 48, 8).double()
    whole = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    order = torch.rand(2, 4, 6, 6).argsort(-1)
    parts = [Partial(*OP(q, k, v, some, 8, 8, 0.3)) for some in (order[..., :2], order[..., 2:])]
    torch.testing.assert_close(merge(*parts).out, whole)
    pieces = [attend(q, k[:, :, rows], v[:, :, rows], 0.3) for rows in (slice(5), slice(5, 48))]
    torch.testing.assert_close(merge(*pieces).out, whole)
    torch.testing.assert_close(merge(*pieces).lse, (q @ k.mT * 0.3).logsumexp(-1))


def test_parts_without_keys_weigh_nothing_and_have_gradients() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    k, v = torch.randn(2, 1, 1, 5, 4)
    hidden = torch.zeros(3, 5)
    hidden[1] = hidden[2, :3] = -torch.inf
    one, none = attend(q, k, v, 0.5, hidden), attend(q, k, v, 0.5, torch.full((3, 5), -torch.inf))
    both = merge(one, none)
    torch.testing.assert_close(both.out, one.out)
    torch.testing.assert_close(both.lse, one.lse)
    assert both.lse[0, 0, 1] == -torch.inf
    assert not both.out[0, 0, 1].any()
    both.out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_work_is_that_of_the_listed_blocks() -> None:
    shapes = [(2, 4, 100, 8), (2, 2, 90, 8), (2, 2, 90, 6), (1, 1, 10, 3)]
    assert flops(shapes, (2, 4, 100, 6), key_block=16) == {
        "attention": 2 * 2 * 4 * 100 * 48 * (8 + 6)
    }
