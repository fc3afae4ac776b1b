"""The front door, on the reference backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.backends.base import Backend, Lowered
from blockwright.backends.eager import EagerBackend
from blockwright.driver import compile as module
from blockwright.driver.calibration import CERTIFIED_SETS
from blockwright.ir.errors import CaptureError, LoweringError, NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig

RECIPE = "fuse-projections, quantize-weights{bits=8}"


def test_an_engine_is_called_like_the_model(gpt: GPT, tokens: Tensor) -> None:
    engine = bw.compile(gpt, example_inputs=(tokens,), backend="eager")
    torch.testing.assert_close(engine(tokens), gpt(tokens))
    torch.testing.assert_close(engine(tokens=tokens), gpt(tokens))


def test_example_inputs_come_from_the_model(gpt: GPT) -> None:
    engine = bw.compile(gpt, RECIPE, backend="eager")
    (inputs,) = gpt.example_inputs()
    error = (engine(inputs) - gpt(inputs)).norm() / gpt(inputs).norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("form", ["text", "passes", "mixed", "toml"])
def test_recipes_in_every_form_agree(program: Program, form: str, tmp_path: Path) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text('[[pass]]\nname = "fuse-projections"\n[[pass]]\nname = "quantize-weights"\n')
    forms: dict[str, Any] = {
        "text": "fuse-projections, quantize-weights",
        "passes": [bw.FuseProjections(), bw.QuantizeWeights()],
        "mixed": ["fuse-projections", bw.QuantizeWeights()],
        "toml": toml,
    }
    engine = bw.compile(program, forms[form], backend="eager")
    assert engine.record["recipe"] == "fuse-projections, quantize-weights"
    assert [step["pass"] for step in engine.record["steps"]] == [
        "fuse-projections",
        "quantize-weights",
    ]


def test_the_model_is_not_changed(gpt: GPT, tokens: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    keys = set(vars(gpt))
    bw.compile(gpt, RECIPE, (tokens,), backend="eager")
    assert set(vars(gpt)) == keys
    assert all(torch.equal(before[name], tensor) for name, tensor in gpt.state_dict().items())


def test_certificates_use_calibration_inputs(gpt: GPT, tokens: Tensor) -> None:
    batches = ((tokens.flip(0),) for _ in range(100))
    engine = bw.compile(gpt, RECIPE, (tokens,), calibration=batches, backend="eager")
    certificate = engine.record["steps"][-1]["certificate"]
    assert certificate["inputs"] == 1 + CERTIFIED_SETS
    assert next(batches) is not None  # no more batches were taken than used


def test_progress_is_told_in_order(gpt: GPT) -> None:
    seen: list[tuple[str, int, int]] = []
    bw.compile(gpt, RECIPE, backend="eager", progress=lambda *args: seen.append(args))
    stages = list(dict.fromkeys(what for what, _, _ in seen))
    assert stages[:3] == ["capture", "fuse-projections", "quantize-weights"]
    assert all(0 <= done <= total for _, done, total in seen)


def test_nan_weights_are_refused() -> None:
    model = GPT(GPTConfig(vocab=8, context=8, dim=4, heads=1, depth=1, ffn_dim=4))
    with torch.no_grad():
        model.blocks[0].up.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"'blocks.0.up.weight' holds 1 NaN"):
        bw.compile(model, backend="eager")
    bw.compile(model, backend="eager", allow_nonfinite=True)


def test_bad_names_fail_before_any_work(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capture", lambda *a, **k: pytest.fail("captured"))
    with pytest.raises(OptionError, match="no backend 'tpu'"):
        bw.compile(gpt, backend="tpu")
    with pytest.raises(OptionError, match="quantise-weights"):
        bw.compile(gpt, "quantise-weights", backend="eager")


def test_nothing_to_do_is_an_error(tokens: Tensor) -> None:
    with pytest.raises(NoMatchError, match="fuse-projections changed nothing"):
        bw.compile(nn.ReLU(), "fuse-projections", (torch.zeros(2),), backend="eager")


def test_meta_weights_cannot_be_lowered() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=8, context=8, dim=4, heads=1, depth=2, ffn_dim=4))
        tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(LoweringError, match="on the meta device"):
        bw.compile(model, "fuse-projections", (tokens,), backend="eager")


class Sleepy(EagerBackend):
    """Eager, and slower than it."""

    def lower(self, program: Program, options: Any) -> Lowered:
        return Delayed(super().lower(program, options))


class Delayed(Lowered):
    def __init__(self, inner: Lowered) -> None:
        self.inner = inner

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        torch.randn(700, 700) @ torch.randn(700, 700)
        return self.inner.run(inputs)


class Broken(EagerBackend):
    def lower(self, program: Program, options: Any) -> Lowered:
        raise LoweringError("no kernel for this op.")


class Absent(EagerBackend):
    def missing(self) -> str | None:
        return "pip install it"


@pytest.mark.parametrize("other", [Sleepy, Broken, Absent])
def test_auto_is_never_slower_than_eager(
    program: Program, monkeypatch: pytest.MonkeyPatch, other: type[Backend]
) -> None:
    backends = {"eager": EagerBackend, "onnxruntime": other}
    monkeypatch.setattr(module, "get_backend", lambda name: backends[name]())
    engine = bw.compile(program)
    assert engine.backend == "eager"
    assert engine.record["backend"]["chosen"] == "eager"


def test_a_named_backend_is_never_replaced(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_backend", lambda name: Absent())
    with pytest.raises(LoweringError, match="not usable here"):
        bw.compile(program, backend="onnxruntime")


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.randint(0, 40, (2, 8)), "attention_mask": torch.ones(2, 8).long()}
    engine = bw.compile(tmp_path, "fuse-projections", inputs, backend="eager")
    with torch.no_grad():
        expected = model(**inputs)
    result = engine(**inputs)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)
    assert len(engine.record["steps"][0]["receipt"]["changed"]) == 2


class Counters(nn.Module):
    """Two buffers, written in the other order than they are declared."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("second", torch.full((2,), 10.0))
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.second += 1
        self.first += 2
        return self.linear(x) * self.first + self.second


def test_state_passes_through_every_stage() -> None:
    model, x = Counters(), torch.randn(3, 2)
    engine = bw.compile(model, "quantize-weights", (x,), backend="eager")
    assert {slot.name for slot in engine.program.state} == {"first", "second"}
    session = engine.session()
    weight = engine.program.require("linear.bias")
    for step in (1, 2):
        y = session(torch.zeros(3, 2))
        torch.testing.assert_close(y[0], weight * 2 * step + 10 + step)
