"""Every CPU layer against the meaning of its codes, in fp64 or in integers."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from blockwright.kernels import cpu_linear
from blockwright.kernels.cpu_linear import (
    Bf16Int4Linear,
    Bf16Int8Linear,
    CompiledInt8Linear,
    FoldedLinear,
    Int8Linear,
    QuantizedTable,
    RoundedLinear,
)

INT8_FORMS = (RoundedLinear, Int8Linear, CompiledInt8Linear)
SIZES = [(1, 1, 1), (3, 7, 5), (17, 33, 19), (130, 257, 65), (0, 8, 4)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def int8_codes(*shape: int) -> Tensor:
    codes = torch.randint(-64, 65, shape, dtype=torch.int8)
    codes[:1] = 64
    return codes


def int8_reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The int8 layer with integer sums and fp64 around them."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    step = torch.where(step == 0, torch.ones_like(step), step)
    total = torch.round(x / step).to(torch.int64) @ codes.to(torch.int64)
    y = total.double() * step.double() * scale.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("rows", "features", "outputs"), SIZES)
@pytest.mark.parametrize("form", INT8_FORMS)
def test_int8_layers_agree_with_integer_sums(
    form: type[Int8Linear], rows: int, features: int, outputs: int
) -> None:
    x, codes = torch.randn(rows, features), int8_codes(features, outputs)
    scale, bias = torch.rand(outputs) + 0.01, torch.randn(outputs)
    y = form(codes, scale, bias)(x)
    assert y.dtype == torch.float32
    assert y.shape == (rows, outputs)
    assert relative(y, int8_reference(x, codes, scale, bias)) < 1e-6


@pytest.mark.parametrize("form", INT8_FORMS)
def test_int8_layers_are_exact_on_integers(form: type[Int8Linear]) -> None:
    """Rows with a largest value of 127 and scales of 1 leave nothing to round."""
    x = torch.randint(-127, 128, (40, 301)).float()
    x[:, 0], x[0] = 127, 127  # row 0: as large as a sum gets
    codes = int8_codes(301, 24)
    codes[:, 0] = 64
    y = form(codes, torch.ones(24), None)(x)
    assert torch.equal(y.long(), x.long() @ codes.long())


def test_largest_codes_do_not_saturate() -> None:
    codes = torch.full((9, 4096), 64, dtype=torch.int8)
    rows = torch.full((33, 4096), 255, dtype=torch.uint8)
    assert torch.equal(
        cpu_linear.int8_matmul(rows, codes).long(), torch.full((33, 9), 127 * 64 * 4096)
    )


@pytest.mark.parametrize("form", INT8_FORMS)
def test_a_row_of_zeros_gives_the_bias(form: type[Int8Linear]) -> None:
    x, bias = torch.randn(2, 20, 12), torch.randn(6)
    x[1, 3] = 0
    y = form(int8_codes(12, 6), torch.rand(6), bias)(x)
    assert y.shape == (2, 20, 6)
    assert torch.equal(y[1, 3], bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", INT8_FORMS)
def test_int8_layers_keep_the_type_of_their_input(
    form: type[Int8Linear], dtype: torch.dtype
) -> None:
    y = form(int8_codes(12, 6), torch.rand(6, dtype=dtype), None)(torch.randn(20, 12, dtype=dtype))
    assert y.dtype == dtype


def test_quantizing_in_place_gives_the_same_codes() -> None:
    x = torch.randn(500, 384)
    step, rows = cpu_linear.quantize_rows(x)
    assert torch.equal(step, cpu_linear.row_steps(x))
    assert torch.equal(rows, (torch.round(x / step) + 128).to(torch.uint8))


def test_packed_codes_live_as_long_as_the_codes() -> None:
    layer = Int8Linear(int8_codes(12, 6), torch.rand(6), None)
    gc.collect()
    before = len(cpu_linear._packed)
    layer(torch.randn(20, 12))
    layer(torch.randn(20, 12))
    assert len(cpu_linear._packed) == before + 1
    del layer
    gc.collect()
    assert len(cpu_linear._packed) == before


def test_folded_is_a_plain_linear() -> None:
    x, weight, bias = torch.randn(2, 3, 7), torch.randn(7, 5), torch.randn(5)
    y = FoldedLinear(weight, bias)(x)
    assert relative(y, x.double() @ weight.double() + bias.double()) < 1e-6


def test_bf16_int8_is_within_bf16_of_its_meaning() -> None:
    x, scale, bias = torch.randn(2, 3, 64), torch.rand(24) / 100, torch.randn(24)
    codes = torch.randint(-127, 128, (64, 24), dtype=torch.int8)
    expected = x.double() @ (codes.double() * scale.double()) + bias.double()
    y = Bf16Int8Linear(codes, scale, bias)(x)
    assert y.shape == expected.shape
    assert relative(y, expected) < 8e-3


@pytest.mark.parametrize("group_size", cpu_linear.INT4_GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bf16_int4_is_within_bf16_of_its_meaning(group_size: int, symmetric: bool) -> None:
    features, outputs = 512, 48
    groups = features // group_size
    scale, bias = torch.rand(groups, outputs) / 10 + 0.01, torch.randn(outputs)
    codes = torch.randint(-7 if symmetric else 0, 8 if symmetric else 16, (features, outputs))
    zero = None if symmetric else torch.randint(0, 16, (groups, outputs))
    shift = codes if zero is None else codes - zero.repeat_interleave(group_size, dim=0)
    weight = shift.double() * scale.double().repeat_interleave(group_size, dim=0)
    x = torch.randn(2, 3, features)
    y = Bf16Int4Linear(codes, scale, zero, bias, group_size)(x)
    assert relative(y, x.double() @ weight + bias.double()) < 8e-3


def test_bf16_kernels_say_what_they_take() -> None:
    assert Bf16Int8Linear.fits(64, 64, 8, symmetric=True)
    assert not Bf16Int8Linear.fits(63, 63, 8, symmetric=True)
    assert not Bf16Int8Linear.fits(64, 32, 8, symmetric=True)
    assert not Bf16Int8Linear.fits(64, 64, 8, symmetric=False)
    assert Bf16Int4Linear.fits(64, 16, 32, 4)
    assert not Bf16Int4Linear.fits(64, 8, 32, 4)
    assert not Bf16Int4Linear.fits(48, 16, 32, 4)
    assert not Bf16Int4Linear.fits(64, 16, 16, 4)


def test_a_table_looks_up_rows() -> None:
    codes, scale = torch.randint(-127, 128, (11, 6), dtype=torch.int8), torch.rand(11, 1)
    ids = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(QuantizedTable(codes, scale)(ids), codes[ids] * scale[ids])


def relative(value: Tensor, expected: Tensor) -> float:
    """Return the error as a share of the expected norm; 0 when nothing is expected."""
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))
