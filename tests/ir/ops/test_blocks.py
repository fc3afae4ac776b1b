"""Ops on blocks: rounding, storage, products in two lowerings, tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockwright.ir.ops.activations import ACTIVATIONS
from blockwright.ir.ops.block_codes import (
    HUGE,
    LIMITS,
    decode_matrix,
    encode,
    encode_matrix,
    round_to_blocks,
)
from blockwright.ir.ops.block_values import grid_bytes

SETTINGS = settings(derandomize=True, max_examples=25, deadline=None, database=None)
ops = torch.ops.blockwright
forms = st.sampled_from(["int8", "int4"])
widths, sizes, seeds = st.integers(1, 9), st.integers(1, 17), st.integers(0, 2**16)
scales = st.floats(-60, 60).map(lambda power: 2.0**power)


def normal(seed: int, *shape: int) -> Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-6, 6, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator) * torch.exp2(powers)


def by_hand(row: list[float], limit: float) -> list[float]:
    """Round a block in plain Python."""
    peak = max(map(abs, row))
    shift = math.floor(math.log2(limit / peak)) if peak else 0
    return [round(v * 2.0**shift) * 2.0**-shift for v in row]


@SETTINGS
@given(forms, widths, sizes, seeds, scales)
def test_blocks_are_rounded_as_by_hand(
    form: str, width: int, size: int, seed: int, scale: float
) -> None:
    x = normal(seed, 3, size) * scale
    expected = [
        [v for start in range(0, size, width)
         for v in by_hand(row[start : start + width], LIMITS[form])]
        for row in x.tolist()
    ]  # fmt: skip
    rounded = round_to_blocks(x, form, width, pow2=True)
    assert torch.equal(rounded, torch.tensor(expected))
    assert torch.equal(round_to_blocks(rounded, form, width, pow2=True), rounded)
    assert torch.equal(round_to_blocks(x.mT, form, width, axis=-2, pow2=True).mT, rounded)


@SETTINGS
@given(forms, widths, sizes, seeds, st.booleans())
def test_no_number_moves_further_than_half_a_step(
    form: str, width: int, size: int, seed: int, pow2: bool
) -> None:
    x = normal(seed, 2, size)
    codes, shift = encode(x, form, width, pow2=pow2)
    assert codes.abs().max() <= LIMITS[form], "nothing is clamped"
    step = torch.exp2(-shift) if pow2 else 1 / shift
    apart = (round_to_blocks(x, form, width, pow2=pow2) - x).abs()
    bound = step.expand_as(codes).flatten(-2)[:, :size] / 2
    assert (apart <= bound * (1 + 1e-5)).all()


def test_what_no_code_stands_for_stays_and_takes_no_part() -> None:
    x = torch.tensor([[math.inf, 1.0, -math.inf, 0.5], [math.nan, 1.0, -1.7e38, 0.5]])
    rounded = round_to_blocks(x, "int8", 4, pow2=True)
    assert torch.equal(rounded.nan_to_num(7.0), x.nan_to_num(7.0))
    assert abs(x[1, 2]) >= HUGE
    zeros = torch.zeros(2, 5)
    assert torch.equal(round_to_blocks(zeros, "int8", 4, pow2=True), zeros)
    assert torch.equal(round_to_blocks(zeros, "int8", 4, pow2=False), zeros)


def test_an_outlier_costs_its_own_block_only() -> None:
    x = torch.linspace(-1, 1, 64)[None].clone()
    x[0, 3] = 1e30
    rounded = round_to_blocks(x, "int8", 32, pow2=True)
    assert rounded.isfinite().all()
    assert torch.equal(rounded[0, :32].nonzero().flatten(), torch.tensor([3]))
    assert abs(rounded[0, 3] / 1e30 - 1) < 1 / 64
    assert (rounded[0, 32:] - x[0, 32:]).abs().max() < 1 / 64


def test_tiny_numbers_do_not_overflow_their_scale() -> None:
    for x in (torch.full((1, 4), 1e-44), torch.full((1, 4), 1e-38)):
        for pow2 in (True, False):
            assert round_to_blocks(x, "int8", 4, pow2=pow2).isfinite().all()


def test_eight_bit_floats() -> None:
    x = normal(0, 4, 40)
    rounded = round_to_blocks(x, "fp8", 32, pow2=True)
    assert torch.equal(round_to_blocks(rounded, "fp8", 32, pow2=True), rounded)
    large = x.abs() > x.abs().amax() / 256
    assert ((rounded - x)[large] / x[large]).abs().max() <= 1 / 16


@SETTINGS
@given(st.sampled_from([4, 8]), sizes, sizes, widths, widths, seeds, st.booleans())
def test_stored_matrices(
    bits: int, rows: int, columns: int, down: int, across: int, seed: int, pow2: bool
) -> None:
    weight, block = normal(seed, rows, columns), (down, across)
    codes, shift = encode_matrix(weight, bits, block, pow2=pow2)
    assert codes.nbytes + shift.nbytes == grid_bytes(rows, columns, bits, block, pow2=pow2)
    decoded = decode_matrix(codes, shift, columns, bits, block)
    for top in range(0, rows, down):
        for left in range(0, columns, across):
            part = (slice(top, top + down), slice(left, left + across))
            flat = weight[part].reshape(1, -1)
            alone = round_to_blocks(flat, f"int{bits}", flat.numel(), pow2=pow2)
            torch.testing.assert_close(decoded[part].reshape(1, -1), alone, rtol=1e-6, atol=0)
    if pow2:
        again = decode_matrix(*encode_matrix(decoded, bits, block, pow2=True), columns, bits, block)
        assert torch.equal(again, decoded)


def test_four_bit_codes_lie_two_to_a_byte_the_even_column_low() -> None:
    weight = torch.tensor([[1.0, -2.0, 7.0], [0.0, 5.0, -7.0]])
    codes, shift = encode_matrix(weight, 4, (2, 3), pow2=True)
    assert codes.tolist() == [[1 | (14 << 4), 7], [0 | (5 << 4), 9]]
    assert shift.dtype == torch.int8
    assert shift.tolist() == [[0]]


def test_one_block_for_all_is_one_scale_per_tensor() -> None:
    weight = normal(0, 6, 10)
    huge = (2**40, 2**40)
    codes, shift = encode_matrix(weight, 8, huge, pow2=False)
    assert shift.numel() == 1
    factor = 127 / weight.abs().max()
    assert torch.equal(codes, torch.round(weight * factor).to(torch.int8))
    torch.testing.assert_close(decode_matrix(codes, shift, 10, 8, huge), codes / factor)
    stored = encode_matrix(weight, 8, huge, pow2=True)
    x = normal(1, 3, 10)
    simulated, integer = (
        ops.block_linear(x, *stored, None, 8, list(huge), "int8", 2**40, lowering)
        for lowering in (False, True)
    )
    assert torch.equal(simulated, integer)
    rows = ops.block_embedding(torch.tensor([4]), *stored, 10, 8, list(huge), torch.float32)
    assert torch.equal(rows, decode_matrix(*stored, 10, 8, huge)[[4]])


@settings(SETTINGS, max_examples=15)
@given(sizes, widths, widths, widths, st.sampled_from([4, 8]), seeds)
def test_integers_give_the_simulated_bits(
    inner: int, block: int, down: int, across: int, bits: int, seed: int
) -> None:
    x, weight = normal(seed, 2, 3, inner), normal(seed + 1, 5, inner)
    bias = normal(seed + 2, 5)
    stored = encode_matrix(weight, bits, (down, across), pow2=True)
    given_ = (x, *stored, bias, bits, [down, across], "int8", block)
    simulated, integer = (ops.block_linear(*given_, lowering) for lowering in (False, True))
    assert torch.equal(simulated, integer)
    values = normal(seed + 3, 2, inner, 4)
    for form in ("int8", "uint8"):
        rows = x if form == "int8" else x.softmax(-1)
        products = [ops.block_matmul(rows, values, form, "int8", block, True, i) for i in (0, 1)]
        assert torch.equal(*products)


def test_products_are_those_of_rounded_values() -> None:
    x, weight = normal(0, 3, 40), normal(1, 5, 40)
    codes, shift = encode_matrix(weight, 8, (2, 16), pow2=True)
    expected = F.linear(
        round_to_blocks(x, "int8", 32, pow2=True).double(),
        decode_matrix(codes, shift, 40, 8, (2, 16)).double(),
    )
    for integer in (False, True):
        y = ops.block_linear(x, codes, shift, None, 8, [2, 16], "int8", 32, integer)
        torch.testing.assert_close(y, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("integer", [False, True])
def test_nan_stays_in_its_row(integer: bool) -> None:
    x, weight = normal(0, 3, 8), normal(1, 5, 8)
    stored = encode_matrix(weight, 8, (4, 4), pow2=True)
    clean = ops.block_linear(x, *stored, None, 8, [4, 4], "int8", 4, integer)
    x[1, 2] = math.nan
    broken = ops.block_linear(x, *stored, None, 8, [4, 4], "int8", 4, integer)
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2]], clean[[0, 2]])
    assert ops.block_matmul(weight, x.mT, "int8", "int8", 4, True, integer)[:, 1].isnan().all()


@pytest.mark.parametrize("function", sorted(ACTIVATIONS))
def test_tables_hold_the_function_of_every_code(function: str) -> None:
    x = torch.cat([normal(0, 4, 40), torch.zeros(1, 40), normal(1, 1, 40) * 2.0**-14])
    codes = round_to_blocks(x, "int8", 32, pow2=True)
    y = ops.block_activation(x, function, 32)
    expected = ACTIVATIONS[function].value(codes)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2.0**-16)
    x[0, 0] = math.nan
    assert ops.block_activation(x, function, 32).isnan().sum() == 1


def test_softmax_by_table() -> None:
    scores = normal(0, 2, 4, 7)
    p = ops.block_softmax(scores, None, False, 0.5)
    torch.testing.assert_close(p, (scores * 0.5).softmax(-1), atol=0.02, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4))


def test_masked_keys_weigh_nothing() -> None:
    scores = normal(0, 2, 4, 7)
    keep = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[0] = False
    p = ops.block_softmax(scores, keep, False, 1.0)
    assert (p[:, ~keep] == 0).all()
    assert torch.equal(p[:, 0], torch.zeros(2, 7)), "a query without keys gets nothing"
    added = torch.zeros(4, 7).masked_fill(~keep, -math.inf)
    assert torch.equal(ops.block_softmax(scores, added, False, 1.0), p)
    causal = ops.block_softmax(scores, None, True, 1.0)
    assert (causal.triu(1) == 0).all()
    alone = ops.block_softmax(scores[:, 2:3, :3], None, False, 1.0)
    assert torch.equal(causal[:, 2:3, :3], alone)


def test_rows_of_tables() -> None:
    table = normal(0, 9, 7)
    stored = encode_matrix(table, 4, (2, 3), pow2=True)
    ids = torch.tensor([[0, 8], [3, 3]])
    rows = ops.block_embedding(ids, *stored, 7, 4, [2, 3], torch.float32)
    assert torch.equal(rows, decode_matrix(*stored, 7, 4, (2, 3))[ids])
