"""Property K0: capture makes of a module what is built directly; other tests skip capture."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from blockwright.testing import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    ModelConfig,
    WeightSpec,
)
from blockwright.testing.agreement import capture_agrees
from blockwright.testing.strategies import models

GAUSS = WeightSpec(seed=3, kind="gauss")
LLAMA = BlockConfig(
    attention=AttentionConfig(2, 2, 4, "sdpa", "causal", "half", 2, qk_norm=True),
    ffn=FeedForwardConfig(5, "silu", gated=True),
    norm="rms",
    spelled=True,
)
BERT = BlockConfig(
    attention=AttentionConfig(2, 1, 3, "spelled", "padding", bias=True),
    ffn=FeedForwardConfig(3, "gelu_tanh", bias=True),
    norm="layer",
    place="post",
    transposed=True,
)
DIT = BlockConfig(AttentionConfig(2, 1, 3, "sdpa"), FeedForwardConfig(3, "gelu"), norm="layer")
HARD = BlockConfig(
    AttentionConfig(1, 3, 3, "hard", "additive", "interleaved", 1, by_hand=True, bias=True),
    FeedForwardConfig(3, "square"),
    norm="rms",
    place="sandwich",
)
PARALLEL = BlockConfig(
    AttentionConfig(1, 2, 4, "sdpa", "causal", "interleaved", 1, by_hand=True),
    FeedForwardConfig(2, "relu"),
    norm="layer",
    parallel=True,
)
BOTH = ("batch", "seq")
MODELS = {
    "identity": ModelConfig(),
    "embedding": ModelConfig(vocab=5, head="tied"),
    "decoder": ModelConfig(
        "decoder", 4, 7, (LLAMA,) * 3, head="tied", final_norm="rms", dynamic=BOTH, weights=GAUSS
    ),
    "encoder": ModelConfig(dim=4, blocks=(BERT,) * 2, dynamic=("batch",), weights=GAUSS),
    "bfloat16": ModelConfig(dim=4, blocks=(LLAMA,), dtype="bfloat16", weights=GAUSS),
    "shared": ModelConfig(dim=3, blocks=(HARD,), again=True, dynamic=("seq",), weights=GAUSS),
    "parallel": ModelConfig("decoder", 3, 5, (PARALLEL,) * 2, seq=5, weights=GAUSS),
    "dit": ModelConfig("dit", 4, blocks=(DIT,) * 2, dynamic=BOTH, weights=GAUSS),
    "mmdit": ModelConfig("mmdit", 4, blocks=(LLAMA,), dynamic=("batch",), weights=GAUSS),
}


@pytest.mark.parametrize("name", MODELS)
def test_capture_agrees_with_the_program_built_directly(name: str) -> None:
    config = MODELS[name]
    if name == "mmdit":
        attention = AttentionConfig(2, 2, 4, "sdpa", "none", "half", 2)
        config = replace(config, blocks=(replace(LLAMA, attention=attention),))
    capture_agrees(config)


@pytest.mark.slow
@settings(settings.get_profile("ci"), max_examples=60)
@given(models())
def test_capture_agrees_on_random_models(config: ModelConfig) -> None:
    capture_agrees(config)
