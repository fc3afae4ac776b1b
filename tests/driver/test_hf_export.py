"""A converted decoder becomes a Hugging Face directory that gives the same logits, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.hf_export import export_huggingface
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import LoweringError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.passes import Canonicalize, DenseToMoE, QuantizeWeights

transformers = pytest.importorskip("transformers")
FITS = DenseToMoE(shared=0.5, experts=3, active=2, renormalise=True, importance="magnitude")


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Program, Tensor]:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    tokens = torch.randint(0, 32, (2, 6))
    program = bw.capture(model, (tokens,))
    canonical, _ = run_passes(program, [Canonicalize(allow_no_match=True)])
    return config, canonical, tokens


def test_transformers_loads_it_with_the_same_logits(
    dense: tuple[Any, Program, Tensor], tmp_path: Path
) -> None:
    config, program, tokens = dense
    new, _ = run_passes(program, [FITS])
    path = export_huggingface(new, config, tmp_path / "moe", (tokens,))
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert model.config.num_local_experts == 3
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, run(new, [tokens])[0], atol=1e-4, rtol=1e-4
        )
    assert [item.name for item in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([DenseToMoE(shared=0.5, experts=3, active=2, importance="magnitude")], "logits differ"),
        ([bw.EmergentMoE(experts=3, active=1)], "no shared expert"),
        ([FITS, QuantizeWeights()], "packed weights"),
        ([], "0 of 2 networks are in experts"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    dense: tuple[Any, Program, Tensor], tmp_path: Path, passes: list[Any], message: str
) -> None:
    config, program, tokens = dense
    new, _ = run_passes(program, passes)
    with pytest.raises(LoweringError, match=message):
        export_huggingface(new, config, tmp_path / "moe", (tokens,))
    assert not list(tmp_path.iterdir())


def test_never_overwrites(dense: tuple[Any, Program, Tensor], tmp_path: Path) -> None:
    config, program, tokens = dense
    with pytest.raises(LoweringError, match="is there already"):
        export_huggingface(program, config, tmp_path, (tokens,))
