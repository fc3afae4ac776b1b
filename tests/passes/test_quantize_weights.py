"""QuantizeWeights: fires, declines, stays within its bound, is exact on the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts
from blockwright.ir.run import run
from blockwright.passes import DenseToMoE, QuantizeWeights
from blockwright.passes.shared.coded import (
    Int8Linear,
    QuantizedExperts,
    QuantizedLinear,
    experts_bound,
    int8_bound,
    weight_only_bound,
)
from blockwright.passes.shared.codes import Stored, quantize, quantize_experts, quantize_rows

SETTINGS = settings(derandomize=True, max_examples=60, deadline=None, database=None)
bits_, symmetric_ = st.sampled_from([4, 8]), st.booleans()
sizes, seeds = st.integers(1, 9), st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """Quantize and dequantize [out, in] in plain loops."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    high = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            row = [float(v) for v in weight[i, start : start + group]]
            # A short last group is padded with zeros, which an asymmetric range always holds.
            low = 0.0 if symmetric else min(*row, 0.0)
            top = max(abs(v) for v in row) if symmetric else max(*row, 0.0)
            scale = (top - low) / high or 1.0
            zero = 0 if symmetric else round(-low / scale)
            for j, v in enumerate(row):
                code = round(v / scale) + zero
                code = min(max(code, -high if symmetric else 0), high)
                result[i, start + j] = (code - zero) * scale
    return result


@SETTINGS
@given(bits_, symmetric_, sizes, sizes, sizes, seeds)
def test_agrees_with_plain_loops(
    bits: int, symmetric: bool, rows: int, columns: int, group: int, seed: int
) -> None:
    weight, group = normal(seed, rows, columns), min(group, columns)
    module = layer(weight, bits, group, symmetric)
    ours = module.dequantized(columns).T.double()
    theirs = reference(weight, bits, group, symmetric)
    # Codes may differ where v / scale is within rounding of a half.
    step = module.scale.repeat_interleave(group, dim=0)[:columns].T
    assert ((ours - theirs).abs() <= step * 1.001).all()
    assert (ours - theirs).abs().gt(step * 0.01).float().mean() <= 0.2


def layer(weight: Tensor, bits: int, group: int, symmetric: bool) -> QuantizedLinear:
    return QuantizedLinear(quantize(weight, bits, group, symmetric), None, bits, group)


@SETTINGS
@given(bits_, symmetric_, sizes, sizes, sizes, seeds)
def test_output_bound(
    bits: int, symmetric: bool, rows: int, columns: int, group: int, seed: int
) -> None:
    weight, x = normal(seed, rows, columns), normal(seed + 1, 5, columns).double()
    module = layer(weight, bits, min(group, columns), symmetric)
    error = (x @ module.dequantized(columns).double() - x @ weight.double().T).abs()
    assert (error <= weight_only_bound(module, x) * 1.001 + 1e-5).all()


@SETTINGS
@given(sizes, sizes, seeds)
def test_int8_bound(rows: int, columns: int, seed: int) -> None:
    weight, x = normal(seed, rows, columns), normal(seed + 1, 5, columns).double()
    codes, scale = quantize_rows(weight, 64)
    module = Int8Linear(codes.T.contiguous(), scale[:, 0].double(), None)
    error = (module(x) - x @ weight.double().T).abs()
    assert (error <= int8_bound(module.codes, module.scale, x) * 1.001 + 1e-5).all()


@SETTINGS
@given(bits_, sizes, sizes, seeds)
def test_weights_on_the_grid_are_kept_exactly(bits: int, rows: int, groups: int, seed: int) -> None:
    high = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-high, high + 1, (rows, groups * 4), generator=generator)
    codes[:, ::4] = high  # every group reaches the end of the range
    weight = codes * 0.25
    assert torch.equal(layer(weight, bits, 4, True).dequantized(groups * 4).T, weight)


@SETTINGS
@given(bits_, sizes, sizes, seeds, st.integers(-8, 8))
def test_scaling_by_powers_of_two_keeps_codes(
    bits: int, rows: int, columns: int, seed: int, power: int
) -> None:
    weight = normal(seed, rows, columns)
    codes, scale, _ = quantize(weight, bits, columns, True)
    codes2, scale2, _ = quantize(weight * 2.0**power, bits, columns, True)
    assert torch.equal(codes, codes2)
    assert torch.equal(scale * 2.0**power, scale2)


@SETTINGS
@given(sizes, sizes, seeds)
def test_signs_are_symmetric(rows: int, columns: int, seed: int) -> None:
    weight = normal(seed, rows, columns)
    codes, scale = quantize_rows(weight)
    codes2, scale2 = quantize_rows(-weight)
    assert torch.equal(codes, -codes2)
    assert torch.equal(scale, scale2)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_groups_stay_finite(value: float, symmetric: bool) -> None:
    weight = torch.full((3, 8), value)
    weight[1] = -weight[1]
    module = layer(weight, 4, 4, symmetric)
    assert module.scale.isfinite().all()
    assert (module.scale > 0).all()
    assert module.dequantized(8).isfinite().all()


def test_golden(program: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [QuantizeWeights(bits=4, group_size=4)])
    golden("quantize_weights", f"# {step.pass_}: {step.receipt}\n{new.text()}")


CASES: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"bits": 4},
    {"bits": 4, "group_size": 3},
    {"bits": 4, "group_size": 4, "symmetric": False},
    {"activations": "int8"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_certificate_keeps_the_bound(program: Program, tokens: Tensor, options: Any) -> None:
    new, (step,) = run_passes(program, [QuantizeWeights(**options)], [[tokens]])
    assert step.certificate is not None
    assert step.certificate.bound is not None
    assert 0 < step.certificate.bound.worst_ratio <= 1
    assert step.certificate.bound.checked == len(step.receipt.changed) == 18
    assert step.receipt.bytes[1] < step.receipt.bytes[0]
    assert step.receipt.parameters[1] == step.receipt.parameters[0]
    assert run(new, [torch.zeros(5, 8, dtype=torch.int64)])[0].isfinite().all()


def test_more_bits_err_less(program: Program, tokens: Tensor) -> None:
    errors = []
    for bits in (4, 8):
        _, (step,) = run_passes(program, [QuantizeWeights(bits=bits)], [[tokens]])
        assert step.certificate is not None
        (output,) = step.certificate.outputs.values()
        errors.append(output.difference)
    assert errors[1] < errors[0] / 4


def test_declines(program: Program) -> None:
    _, (step,) = run_passes(program, [QuantizeWeights(include=("*.up",))])
    assert step.receipt.changed == ("blocks.0.up", "blocks.1.up", "blocks.2.up")
    _, (step,) = run_passes(program, [QuantizeWeights(embeddings=True)])
    assert step.receipt.skipped == {
        "tokens": "shares its weight with another place of the model",
        "head": "shares its weight with another place of the model",
    }


def test_experts_are_quantized_and_their_router_is_not(program: Program, tokens: Tensor) -> None:
    experts = DenseToMoE(experts=3, active=1, importance="magnitude")
    dense, _ = run_passes(program, [experts], [[tokens]])
    new, (step,) = run_passes(dense, [QuantizeWeights(bits=4, group_size=4)], [[tokens]])
    assert {"blocks.0.up_down.up", "blocks.0.up_down.down"} < set(step.receipt.changed)
    assert step.receipt.skipped["blocks.0.up_down"].startswith("is a router")
    assert step.certificate is not None
    assert step.certificate.bound is not None
    assert step.certificate.bound.checked == len(step.receipt.changed) == 24
    assert 0 < step.certificate.bound.worst_ratio <= 1
    old, costs = dense.cost(), step.certificate.costs
    assert costs["parameters"].measured == old.parameters
    assert costs["activated_parameters"].measured == old.activated_parameters
    (region, *_), (before, *_) = new.regions(Experts), dense.regions(Experts)
    assert before.is_dense
    assert not region.is_dense
    assert not any(name.endswith(("up_down.up", "up_down.down")) for name in new.tensors)
    step_size = before.weights()["up"].abs().amax() / 7
    assert (region.weights()["up"] - before.weights()["up"]).abs().max() <= step_size / 2


def test_experts_keep_their_type(program: Program, tokens: Tensor) -> None:
    weight = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = QuantizedExperts(quantize_experts(weight, 8, 4, True), 8, 4, 12)
    assert module().dtype == module.scale.dtype == torch.bfloat16
    exact = QuantizedExperts(
        Stored(module.codes, module.scale.float(), module.zero_point), 8, 4, 12
    )
    assert ((exact() - weight.float()).abs() <= experts_bound(exact) * 1.001).all()


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_embedding_tables() -> None:
    model, ids = Lookup(), torch.tensor([[1, 2], [9, 0]])
    program = capture(model, (ids,))
    with pytest.raises(NoMatchError, match="set embeddings=true"):
        run_passes(program, [QuantizeWeights()])
    new, (step,) = run_passes(program, [QuantizeWeights(embeddings=True)], [[ids]])
    assert step.certificate is not None
    assert step.certificate.bound is not None
    scale = model.table.weight.abs().amax(1, keepdim=True) / 127
    assert ((run(new, [ids])[0] - model(ids)).abs() <= scale[ids] / 2 * 1.001).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 is not supported; use one of 4, 8"),
        ({"group_size": 0}, "group_size=0 holds no weight"),
        ({"activations": "int4"}, "activations=int4 is not supported"),
        ({"activations": "int8", "bits": 4}, "activations=int8 needs bits=8"),
        ({"activations": "int8", "group_size": 32}, "activations=int8 needs bits=8"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeWeights(**options)


def test_renders_as_in_a_recipe() -> None:
    text = str(QuantizeWeights(bits=4, group_size=32, exclude=("*head*",), symmetric=False))
    assert text == 'quantize-weights{bits=4, group_size=32, symmetric=false, exclude=["*head*"]}'
