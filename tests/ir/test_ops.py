"""Structural ops: registered soundly, and references that mean what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockwright.ir.ops import OPS, int8_linear, packing
from blockwright.ir.ops.block_codes import encode_matrix
from blockwright.ir.ops.quantized_linear import weight_of


def linear_arguments(bits: int, *, symmetric: bool) -> tuple[Any, ...]:
    features, outputs, group_size = 10, 6, 4
    low, high = packing.code_range(bits, symmetric)
    codes = torch.randint(low, high + 1, (features, outputs))
    zeros = torch.randint(0, high + 1, (3, outputs))
    zero_point = None if symmetric else store(zeros, bits, symmetric)
    x, scale, bias = torch.randn(2, 3, features), torch.rand(3, outputs), torch.randn(outputs)
    return (x, store(codes, bits, symmetric), scale, zero_point, bias, bits, group_size)


def store(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    return packing.pack_nibbles(codes) if bits == 4 else codes.to(packing.code_dtype(symmetric))


def experts_arguments(*, gated: bool) -> tuple[Any, ...]:
    up, down = torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    x, index = torch.randn(2, 4), torch.tensor([[0, 2], [1, 0]])
    gate = (torch.randn(3, 5, 4), torch.randn(3, 5), torch.randn(3, 5)) if gated else (None,) * 3
    gate_matrix, *biases = gate
    return (x, index, torch.rand(2, 2), gate_matrix, up, *biases, down, None, "silu")


def attention_arguments(*, causal: bool) -> tuple[Any, ...]:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    blocks = torch.tensor([[0, 2], [1, -1], [2, 1], [-1, 0]])[None, None]
    return (*(t.requires_grad_() for t in (q, k, v)), blocks, 2, 4, 0.3, causal)


def coded_arguments(bits: int, *, symmetric: bool) -> tuple[Any, ...]:
    """Weights of three experts as codes."""
    calls = [linear_arguments(bits, symmetric=symmetric) for _ in range(3)]
    codes, scale, zeros = zip(*(call[1:4] for call in calls), strict=True)
    zero_point = None if symmetric else torch.stack(zeros)
    return (torch.stack(codes), torch.stack(scale), zero_point, bits, 4, 10)


def blocks_arguments(bits: int) -> dict[str, tuple[Any, ...]]:
    """A call of every op on blocks, by its name."""
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    stored, block = encode_matrix(weight, bits, (4, 3), pow2=True), [4, 3]
    form, integer = ("int8", True) if bits == 8 else ("fp8", False)
    return {
        "block_round": (x, form, 4, -1 if integer else -2, integer),
        "block_weight": (x, *stored, [5, 8], bits, block),
        "block_embedding": (torch.tensor([[1, 4, 0]]), *stored, 8, bits, block, torch.float32),
        "block_linear": (x, *stored, torch.randn(5), bits, block, form, 4, integer),
        "block_matmul": (x, x.mT.contiguous(), form, form, 3, True, integer),
        "block_activation": (x, "gelu", 4),
        "block_softmax": (x, torch.randn(3, 8), False, 0.5),
    }


BLOCKS = [blocks_arguments(bits) for bits in (8, 4)]
CALLS = {
    **{name: [calls[name] for calls in BLOCKS] for name in BLOCKS[0]},
    "dequantize": [coded_arguments(4, symmetric=False), coded_arguments(8, symmetric=True)],
    "block_attention": [attention_arguments(causal=causal) for causal in (False, True)],
    "quantized_linear": [
        linear_arguments(bits, symmetric=symmetric)
        for bits in (4, 8)
        for symmetric in (True, False)
    ],
    "int8_linear": [
        (torch.randn(2, 3, 8), torch.ones(8, 5, dtype=torch.int8), torch.rand(5), bias)
        for bias in (None, torch.randn(5))
    ],
    "hash_linear": [
        (torch.randn(2, 3, 8), torch.randn(4, 4, 5), bias, score)
        for bias, score in ((None, "softmax"), (torch.randn(5), "l1_softmax"))
    ],
    "moe_ffn": [experts_arguments(gated=gated) for gated in (False, True)],
    "quantized_embedding": [
        (torch.tensor([[0, 3]]), torch.ones(4, 5, dtype=torch.int8), torch.rand(4, 1))
    ],
}
CASES = [(name, arguments) for name, calls in CALLS.items() for arguments in calls]


def test_every_op_is_tried_below() -> None:
    assert {f"blockwright.{name}.default" for name in CALLS} == set(OPS)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_registration_is_sound(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(OPS[f"blockwright.{name}.default"].overload, arguments)


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 9),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_nibbles_come_back(rows: int, columns: int, signed: bool, seed: int) -> None:
    low, high = (-8, 8) if signed else (0, 16)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    packed = packing.pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert len(packed) == (rows * columns + 1) // 2
    assert torch.equal(packing.unpack_nibbles(packed, (rows, columns), signed=signed), codes)


@given(
    features=st.integers(1, 12),
    outputs=st.integers(1, 5),
    group_size=st.integers(1, 13),
    bits=st.sampled_from(packing.BITS),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_weight_is_shifted_and_scaled_per_group(
    features: int, outputs: int, group_size: int, bits: int, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    groups = -(-features // group_size)
    low, high = packing.code_range(bits, symmetric)
    codes = torch.randint(low, high + 1, (features, outputs))
    zeros = torch.zeros(groups, outputs) if symmetric else torch.randint(0, high, (groups, outputs))
    scale = torch.rand(groups, outputs)
    zero_point = None if symmetric else store(zeros, bits, symmetric)
    weight = weight_of(features, store(codes, bits, symmetric), scale, zero_point, bits, group_size)
    for i in range(features):
        group = i // group_size
        assert torch.equal(weight[i], (codes[i] - zeros[group]) * scale[group])


def test_low_nibble_comes_first() -> None:
    assert packing.pack_nibbles(torch.tensor([1, 2, 3])).tolist() == [0x21, 0x03]


def test_quantized_linear_multiplies_by_the_weight() -> None:
    x, codes, scale, zero_point, bias, bits, group_size = linear_arguments(4, symmetric=False)
    weight = weight_of(x.shape[-1], codes, scale, zero_point, bits, group_size)
    y = torch.ops.blockwright.quantized_linear(x, codes, scale, zero_point, bias, bits, group_size)
    torch.testing.assert_close(y, x @ weight + bias)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_turns_the_weight_of_every_expert(symmetric: bool) -> None:
    codes, scale, zeros, *how = coded_arguments(4, symmetric=symmetric)
    found = torch.ops.blockwright.dequantize(codes, scale, zeros, *how)
    for expert in range(3):
        own = None if zeros is None else zeros[expert]
        weight = weight_of(10, codes[expert], scale[expert], own, 4, 4)
        assert torch.equal(found[expert], weight.T)


def test_int8_linear_is_exact_on_integers() -> None:
    x = torch.randint(-127, 128, (5, 33)).float()
    x[:, 0] = 127
    limit = int8_linear.WEIGHT_LIMIT
    codes = torch.randint(-limit, limit + 1, (33, 7), dtype=torch.int8)
    y = torch.ops.blockwright.int8_linear(x, codes, torch.ones(7), None)
    assert torch.equal(y.long(), x.long() @ codes.long())


def test_pairs_of_products_fit_sixteen_bits() -> None:
    assert 255 * int8_linear.WEIGHT_LIMIT * 2 < 2**15
