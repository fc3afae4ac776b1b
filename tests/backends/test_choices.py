"""Every backend computes one branch of a choice, and keeps weights of branches once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeLowered
from blockwright.backends.registry import get_backend
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.run import run

STEPS = [torch.tensor(step) for step in range(3)]
WIDTH = 24  # a weight of a layer is too large to be repeated inside a model


class Chooser(nn.Module):
    """One choice in another; a layer that stands in a branch and outside; a branch that copies."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.deep = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.cond(step < 1, lambda x: self.shared(self.deep(x)), lambda x: x * 1, (x,))

        y = torch.cond(step < 2, lambda x: inner(self.shared(x)), lambda x: x.clone(), (x,))
        return self.shared(y) + x


@pytest.fixture(scope="module")
def chooser() -> Program:
    torch.manual_seed(0)
    x = torch.randn(2, WIDTH)
    shapes = ({0: Dim("batch", min=1, max=8)}, None)
    return capture(Chooser().eval(), (x, STEPS[0]), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def lowered(chooser: Program) -> OnnxRuntimeLowered:
    made = OnnxRuntimeBackend().lower(chooser, {"threads": 1})
    assert isinstance(made, OnnxRuntimeLowered)
    return made


def assert_parity(program: Program, lowered: Any) -> None:
    for batch in (2, 5, 1):
        x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(batch))
        for step in STEPS:
            expected = run(program, [x, step])
            torch.testing.assert_close(lowered.run([x, step]), expected, rtol=1e-5, atol=1e-5)


def test_eager(chooser: Program) -> None:
    assert_parity(chooser, get_backend("eager").lower(chooser, {"threads": 1}))


@pytest.mark.slow
def test_inductor(chooser: Program) -> None:
    assert_parity(chooser, get_backend("inductor").lower(chooser, {"threads": 1}))


class Turned(nn.Module):
    """Chooses between products with a value that lies in memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        turned = self.inner(x).transpose(0, 1).contiguous()
        y: Tensor = torch.cond(flag, lambda y: 2 * y, lambda y: y / 2, (turned,))
        return y.transpose(0, 1)


@pytest.mark.slow
def test_inductor_lays_operands_out_as_branches_take_them() -> None:
    model, x = Turned().eval(), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    program = capture(model, (x, torch.tensor(True)))
    lowered = get_backend("inductor").lower(program, {"threads": 1})
    for flag in (torch.tensor(True), torch.tensor(False)):
        torch.testing.assert_close(lowered.run([x, flag]), run(program, [x, flag]))


def test_onnxruntime(chooser: Program, lowered: OnnxRuntimeLowered) -> None:
    assert_parity(chooser, lowered)


def test_onnx_keeps_weights_of_branches_once_and_outside(
    chooser: Program, lowered: OnnxRuntimeLowered
) -> None:
    model = lowered.model
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    branches = [attribute.g for attribute in choice.attribute]
    assert any(node.op_type == "If" for branch in branches for node in branch.node)
    assert not any(branch.initializer for branch in branches)
    names = Counter(tensor.name for tensor in model.graph.initializer)
    assert {"shared.weight", "deep.weight"} <= names.keys()
    assert max(names.values()) == 1
    assert len(model.SerializeToString()) < 2 * WIDTH * WIDTH * 4  # less than the weights
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()


def products(lowered: OnnxRuntimeLowered, step: Tensor, folder: Path) -> int:
    """Count the matrix products of one call, as ONNX Runtime's profile has them."""
    setup = ort.SessionOptions()
    setup.enable_profiling, setup.profile_file_prefix = True, str(folder / "profile")
    weights = lowered._weights
    setup.add_external_initializers(list(weights), list(weights.values()))
    session = ort.InferenceSession(
        lowered.model.SerializeToString(), setup, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    given = [torch.randn(2, WIDTH).numpy(), step.numpy()]
    session.run(None, dict(zip(names, given, strict=True)))
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event.get("name", "").endswith("_kernel_time")]
    return sum("Gemm" in e["args"]["op_name"] or "MatMul" in e["args"]["op_name"] for e in ran)


def test_onnxruntime_does_not_compute_the_other_branch(
    lowered: OnnxRuntimeLowered, tmp_path: Path
) -> None:
    assert [products(lowered, step, tmp_path) for step in STEPS] == [4, 2, 1]


def test_an_artefact_brings_choices_back(chooser: Program, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, WIDTH)
    engine = bw.compile(
        Chooser().eval(),
        example_inputs=(x, STEPS[0]),
        backend="onnxruntime",
        options={"threads": 1},
    )
    engine.save(tmp_path / "model.bw")
    loaded = bw.load(tmp_path / "model.bw")
    for step in STEPS:
        expected = run(chooser, [x, step])[0]
        for called in (engine, loaded):
            torch.testing.assert_close(called(x, step), expected, rtol=1e-5, atol=1e-5)
