"""Experts on every backend: numbers of the reference, at any size and routing, k dynamic or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.backends.cpu_ops import lower_structural
from blockwright.backends.onnxruntime import OnnxRuntimeBackend
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.kernels.activations import FUNCTIONS

THREADS = {"threads": 1}
TOKENS = {0: Dim("batch", min=1, max=64), 1: Dim("seq", min=1, max=64)}


class Routed(nn.Module):
    """A router over experts of width 4 on rows of 8."""

    def __init__(
        self, experts: int = 4, k: int = 2, *, gated: bool, bias: bool, activation: str
    ) -> None:
        super().__init__()
        self.router, self.k, self.activation = nn.Linear(8, experts), k, activation

        def make(*shape: int, there: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.randn(*shape)) if there else None

        self.gate, self.up = make(experts, 4, 8, there=gated), make(experts, 4, 8)
        self.gate_bias = make(experts, 4, there=gated and bias)
        self.up_bias, self.down_bias = make(experts, 4, there=bias), make(experts, 8, there=bias)
        self.down = make(experts, 8, 4)

    def experts(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        weights = (self.gate, self.up, self.up_bias, self.gate_bias, self.down, self.down_bias)
        return torch.ops.blockwright.moe_ffn(x, index, weight, *weights, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(self.k, -1)
        return self.experts(x, index, weight)


class Side(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: list[Routed]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class Chosen(Routed):
    """Experts that are given from outside, with a number of choices known at run time."""

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.experts(x, index, weight)


def captured(**options: object) -> Program:
    torch.manual_seed(0)
    model = Routed(**options).eval()  # type: ignore[arg-type]
    return capture(model, torch.randn(2, 5, 8), dynamic_shapes=(TOKENS,))


def assert_parity(program: Program, call: Callable[..., list[Tensor]], *inputs: Tensor) -> None:
    (expected,), (value,) = run(program, inputs, dtype=torch.float64), call(list(inputs))
    assert value.shape == expected.shape
    assert (value - expected).norm() <= 1e-5 * expected.norm().clamp_min(1e-30)


def on_onnxruntime(program: Program) -> Callable[..., list[Tensor]]:
    return OnnxRuntimeBackend().lower(program, THREADS).run


def on_pytorch(program: Program) -> Callable[..., list[Tensor]]:
    lowered = lower_structural(program, {})
    targets = {str(n.target) for g in lowered.graphs.values() for n in g.nodes}
    assert "blockwright_cpu.moe_ffn.default" in targets
    return lambda inputs: list(lowered.module()(*inputs))


BACKENDS = [on_onnxruntime, on_pytorch]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("gated", "bias", "activation"),
    [(False, False, "relu"), (True, True, "silu")],
)
def test_any_batch_and_length(
    backend: Callable[..., Callable[..., list[Tensor]]], gated: bool, bias: bool, activation: str
) -> None:
    program = captured(gated=gated, bias=bias, activation=activation)
    call = backend(program)
    for shape in ((2, 5, 8), (1, 1, 8), (1, 7, 8), (9, 8, 8)):
        assert_parity(program, call, torch.randn(shape))


def test_onnx_has_every_activation() -> None:
    torch.manual_seed(0)
    kinds = sorted(FUNCTIONS)
    layers = [Routed(2, 1, gated=True, bias=False, activation=kind) for kind in kinds]
    x = torch.randn(5, 8)
    program = capture(Side(layers).eval(), x)
    expected, found = run(program, [x]), on_onnxruntime(program)([x])
    assert len(found) == len(FUNCTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_for_everybody(
    backend: Callable[..., Callable[..., list[Tensor]]],
) -> None:
    program = captured(experts=1, k=1, gated=False, bias=True, activation="relu")
    assert_parity(program, backend(program), torch.randn(3, 4, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_are_counted_at_run_time(
    backend: Callable[..., Callable[..., list[Tensor]]],
) -> None:
    torch.manual_seed(0)
    model = Chosen(experts=6, gated=True, bias=True, activation="silu").eval()
    k, tokens = Dim("k", min=1, max=6), Dim("tokens", min=1, max=64)

    def inputs(tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.rand(tokens, 6).topk(k, dim=-1).indices
        return torch.randn(tokens, 8), index, torch.randn(tokens, k)

    shapes = ({0: tokens}, {0: tokens, 1: k}, {0: tokens, 1: k})
    program = capture(model, inputs(5, 2), dynamic_shapes=shapes)
    call = backend(program)
    for count in (1, 2, 3, 6):
        assert_parity(program, call, *inputs(7, count))
    x, _, weight = inputs(12, 2)
    assert_parity(program, call, x, torch.tensor([[4, 1]]).repeat(12, 1), weight)  # all on two


def test_onnx_skips_work_with_standard_ops_alone() -> None:
    program = captured(experts=3, gated=False, bias=False, activation="relu")
    model = OnnxRuntimeBackend().lower(program, THREADS).model  # type: ignore[attr-defined]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Split") == 1
    assert kinds.count("Gemm") == 2 * 3
    assert not {"NonZero", "ScatterND", "Loop", "If"} & set(kinds)


@pytest.mark.slow
def test_inductor_in_this_process_and_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Routed(gated=True, bias=True, activation="silu").eval()
    x = torch.randn(2, 5, 8)
    engine = bw.compile(
        model, [], (x,), dynamic_shapes=(TOKENS,), backend="inductor", options=THREADS
    )
    for shape in ((2, 5, 8), (1, 1, 8), (9, 8, 8)):
        value = torch.randn(shape)
        torch.testing.assert_close(engine(value), model(value), rtol=1e-4, atol=1e-5)
    engine.save(tmp_path / "model.bw")
    script = (
        "import sys, torch, blockwright as bw\n"
        "engine = bw.load(sys.argv[1], trust=True)\n"
        "torch.manual_seed(1)\n"
        "print(float(engine(torch.randn(2, 5, 8)).sum()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.bw")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    torch.manual_seed(1)
    assert float(result.stdout.splitlines()[-1]) == pytest.approx(
        float(model(torch.randn(2, 5, 8)).sum()), rel=1e-3, abs=1e-3
    )
