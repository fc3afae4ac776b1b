"""Structural ops give way to fast modules, and numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.backends import cpu_ops
from blockwright.backends.cpu_ops import lower_structural
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.ops import OPS
from blockwright.ir.program import Program
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.passes import QuantizeWeights


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=i != 1) for i in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def quantized(rows: int, **options: Any) -> tuple[Program, list[Tensor]]:
    """Return a program over `rows` tokens and its inputs."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (1, rows))
    program = capture(Tagger(), ids)
    method = QuantizeWeights(**options)
    plan = method.plan(program)
    replacements = [
        (region, method.replace(region, plan.decisions[region.label]))
        for region in method.regions(program)
        if region.label in plan.decisions
    ]
    return rewrite(program, replacements, by=method.name), [ids]


def targets(program: Program) -> set[str]:
    return {str(node.target) for graph in program.graphs.values() for node in graph.nodes}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"activations": "int8", "embeddings": True},
        {"bits": 8},
        {"bits": 8, "symmetric": False},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 24, "symmetric": False},
    ],
)
def test_numbers_stay(options: dict[str, Any], rows: int, compiled: bool) -> None:
    program, inputs = quantized(rows, **options)
    lowered = lower_structural(program, {}, compiled=compiled)
    assert not targets(lowered) & OPS.keys()
    torch.testing.assert_close(run(lowered, inputs), run(program, inputs), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        list(lowered.module()(*inputs)), run(program, inputs), rtol=1e-5, atol=2e-5
    )


def test_int8_layers_become_integer_products() -> None:
    program, inputs = quantized(40, activations="int8")
    lowered = lower_structural(program, {})
    assert "blockwright_cpu.int8_linear.default" in targets(lowered)
    assert torch.equal(run(lowered, inputs)[0], run(program, inputs)[0])


def test_few_rows_are_multiplied_as_floats() -> None:
    program, _ = quantized(cpu_ops.INT8_ROWS - 1, activations="int8")
    assert "aten.linear.default" in targets(lower_structural(program, {}))


def test_bf16_is_used_only_when_asked_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "_bf16_rows", lambda bits, weights: 4)
    few, inputs = quantized(3, bits=4, group_size=32)
    assert "aten.linear.default" in targets(lower_structural(few, {}))
    lowered = lower_structural(few, {"activations": "bf16"})
    assert "aten._weight_int4pack_mm_for_cpu.default" in targets(lowered)
    torch.testing.assert_close(run(lowered, inputs), run(few, inputs), rtol=0.05, atol=0.05)
    many, _ = quantized(5, bits=4, group_size=32)
    assert "aten.linear.default" in targets(lower_structural(many, {"activations": "bf16"}))


def test_small_layers_never_take_packed_kernels() -> None:
    assert cpu_ops._bf16_rows(4, cpu_ops.BF16_WEIGHTS - 1) == 0


def test_codes_that_could_saturate_keep_the_reference() -> None:
    program, inputs = quantized(40, activations="int8")
    wide = {
        name: tensor * 1 if tensor.dtype != torch.int8 else tensor.clone().fill_(100)
        for name, tensor in program.tensors.items()
    }
    program = program.with_(tensors=wide)
    lowered = lower_structural(program, {})
    assert "blockwright.int8_linear.default" in targets(lowered)
    assert torch.equal(run(lowered, inputs)[0], run(program, inputs)[0])


def test_a_program_without_structural_ops_is_returned_as_it_is() -> None:
    program = capture(nn.Linear(4, 4), torch.randn(2, 4))
    assert lower_structural(program, {}) is program


def test_unknown_activations_are_refused() -> None:
    program = capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(OptionError, match="activations='int3' is unknown"):
        lower_structural(program, {"activations": "int3"})
