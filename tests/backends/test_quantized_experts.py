"""Experts over codes on every backend: numbers of the reference, and only codes are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.backends.cpu_ops import lower_structural
from blockwright.backends.onnx_model import to_onnx
from blockwright.backends.onnx_rows import find, span
from blockwright.backends.onnxruntime import VARIANTS, OnnxRuntimeLowered, weight_values
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError
from blockwright.ir.program import Program
from blockwright.ir.run import run

EXPERTS = 4


class Routed(nn.Module):
    """A router over gated experts of odd width on rows of 9."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(9, EXPERTS)
        self.gate, self.up = (nn.Parameter(torch.randn(EXPERTS, 5, 9)) for _ in range(2))
        self.down, self.bias = nn.Parameter(torch.randn(EXPERTS, 9, 5)), None
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 5))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, -1)
        given = (self.gate, self.up, self.up_bias, None, self.down, None)
        return torch.ops.blockwright.moe_ffn(x, index, weight, *given, "silu")


def quantized(**options: Any) -> Program:
    torch.manual_seed(0)
    x = torch.randn(7, 9)
    program = capture(Routed().eval(), x, dynamic_shapes=({0: Dim("tokens", min=1, max=64)},))
    new, (step,) = run_passes(program, [bw.QuantizeWeights(**options)], [[x]])
    assert step.receipt.changed == ("gate", "up", "down")
    assert step.certificate is not None
    assert step.certificate.bound is not None
    assert step.certificate.bound.checked == 3
    return new


def on_onnxruntime(program: Program) -> list[Callable[..., list[Tensor]]]:
    model = to_onnx(program)
    return [OnnxRuntimeLowered(model, program, name, {"threads": 1}).run for name in VARIANTS]


def on_pytorch(program: Program) -> Callable[..., list[Tensor]]:
    lowered = lower_structural(program, {})
    targets = {str(n.target) for g in lowered.graphs.values() for n in g.nodes}
    assert "blockwright_cpu.moe_ffn.default" in targets
    assert "blockwright.dequantize.default" not in targets
    return lambda inputs: list(lowered.module()(*inputs))


CASES = [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 4, "symmetric": False}]


@pytest.mark.parametrize(
    "options",
    [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=str,
)
def test_numbers_of_the_reference(options: dict[str, Any]) -> None:
    program = quantized(**options)
    calls = [on_pytorch(program), *on_onnxruntime(program)]
    for tokens in (1, 7, 33):  # of one token, some experts get none
        x = torch.randn(tokens, 9)
        (expected,) = run(program, [x], dtype=torch.float64)
        for call in calls:
            (found,) = call([x])
            assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_onnx_dequantizes_experts_one_by_one() -> None:
    model = to_onnx(quantized(bits=4, group_size=4, symmetric=False))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") == 3 * EXPERTS == kinds.count("MatMul") - 1  # of gates
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = [stored[f"{name}.codes::{expert}"] for name in ("gate", "up", "down")
             for expert in range(EXPERTS)]  # fmt: skip
    assert {(tensor.data_type, tuple(tensor.dims)) for tensor in codes} == {
        (onnx.TensorProto.UINT4, (9, 5)), (onnx.TensorProto.UINT4, (5, 9)),
    }  # fmt: skip
    assert not any(EXPERTS in tensor.dims and 5 * 9 in tensor.dims for tensor in stored.values())


def test_rows_are_bounds_checked() -> None:
    tensors = {"a": torch.arange(6).reshape(3, 2), "b::1": torch.zeros(1)}
    assert torch.equal(find(tensors, "a::2"), torch.tensor([4, 5]))
    assert find(tensors, "b::1") is tensors["b::1"]
    for name in ("a::3", "a::-1", "a::", "b::0", "c"):
        assert find(tensors, name) is None
    assert span({"a": (100, 24)}, "a::2", 8) == (116, 8)
    program = quantized(bits=8)
    model = to_onnx(program)
    last = next(t for t in model.graph.initializer if t.name == f"up.codes::{EXPERTS - 1}")
    last.name = f"up.codes::{EXPERTS}"
    with pytest.raises(ArtefactError, match=r"differ in 'up\.codes::4'"):
        weight_values(model, program.tensors)


def test_artefacts_hold_codes_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, folders = torch.randn(7, 9), []
    for name, passes in (("floats", []), ("codes", [bw.QuantizeWeights(bits=4)])):
        engine = bw.compile(Routed().eval(), passes, (x,), backend="onnxruntime")
        engine.save(tmp_path / name)
        torch.testing.assert_close(bw.load(tmp_path / name)(x), engine(x))
        folders.append(tmp_path / name)
    floats, codes = (
        sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in folders
    )
    assert codes < 0.6 * floats  # mostly names and scales, at this size


@pytest.mark.slow
def test_inductor_reloads(tmp_path: Path) -> None:
    program, x = quantized(bits=4), torch.randn(7, 9)
    engine = bw.compile(program, [], (x,), backend="inductor", options={"threads": 1})
    (expected,) = run(program, [x])
    torch.testing.assert_close(engine(x), expected, rtol=1e-4, atol=1e-5)
    engine.save(tmp_path / "model.bw")
    torch.testing.assert_close(bw.load(tmp_path / "model.bw", trust=True)(x), engine(x))
