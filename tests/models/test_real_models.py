"""Models of transformers and diffusers: what is found in them, and what their engines return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import blockwright as bw
from blockwright.testing.real_diffusion import DIFFUSION
from blockwright.testing.real_language import LANGUAGE
from blockwright.testing.real_models import RealModel
from blockwright.testing.real_vision import VISION_MODELS

MODELS = LANGUAGE | VISION_MODELS | DIFFUSION
FAST = {"llama", "opt", "bert", "albert", "mamba", "vit", "convnext", "pixart"}
STOCK = [
    "gpt2", "llama", "qwen3", "mistral", "bert", "roberta", "vit", "swin", "clip_text",
    "clip_vision", "t5_encoder", "t5", "dit", "pixart", "flux", "sd3",
]  # fmt: skip
# form, whether there is a table, chunks
MODULATED = {
    "dit": {("per-block", False, 6)},
    "pixart": {("shared", True, 6)},
    "wan": {("shared", True, 6)},
    "flux": {("per-block", False, 12), ("per-block", False, 6)},
}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_what_is_found(name: str) -> None:
    """Capture, recognise, account for everything, and run in eager PyTorch."""
    row = MODELS[name]
    model = built(row)
    program = row.capture(model)
    assert row.differences(program) == {}
    explanation = program.explain()
    assert explanation.inside() == pytest.approx(row.expected.inside, abs=0.02)
    assert min(explanation.inside()) == 1.0 or explanation.near_misses
    assert_equal(model, bw.compile(program, example_inputs=dict(row.inputs), backend="eager"), row)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_in_onnxruntime(name: str) -> None:
    row = MODELS[name]
    model = built(row)
    engine = bw.compile(model, example_inputs=dict(row.inputs), backend="onnxruntime")
    assert_equal(model, engine, row)


def built(row: RealModel) -> nn.Module:
    pytest.importorskip(row.library)
    return row.build()


@torch.no_grad()
def assert_equal(model: nn.Module, engine: Any, row: RealModel) -> None:
    """Compare all outputs: the largest difference relative to the largest value."""
    theirs, ours = list(tensors(model(**row.inputs))), list(tensors(engine(**row.inputs)))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert other.isfinite().all()
        error = float((one - other).abs().max() / other.abs().max())
        assert error < 1e-4, f"relative error {error:.1e}"


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, those of the libraries' own classes in their order."""
    plain = output.to_tuple() if hasattr(output, "to_tuple") else output
    return (leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor))


@pytest.mark.slow
def test_modulations() -> None:
    """Where the layers of a modulation lie, whether blocks have tables, and how many chunks."""
    programs = {name: MODELS[name].capture(built(MODELS[name])) for name in MODULATED}
    forms = {
        name: {(m.form, bool(m.tables), len(m.chunks)) for m in program.modulations()}
        for name, program in programs.items()
    }
    assert forms == MODULATED
    pixart = programs["pixart"]
    assert {m.layers[0].label for m in pixart.modulations()} == {"adaln_single.linear"}
    assert {block.gate_kinds for block in pixart.blocks()} == {("table", "none", "table")}
