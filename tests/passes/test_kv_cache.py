"""KVCache: calls that follow each other give what one call gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError, VerifyError
from blockwright.ir.program import Program
from blockwright.models.bert import TOY as BERT
from blockwright.models.bert import Bert
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.models.llama import Llama, LlamaConfig
from blockwright.passes import Canonicalize, FuseProjections, KVCache, QuantizeWeights

LENGTH = 12
GPT_TOY = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)
LLAMA_TOY = LlamaConfig(
    vocab=32, context=16, dim=8, heads=4, kv_heads=2, head_dim=4, depth=2, ffn_dim=12
)
SEQ = {"tokens": {1: Dim("seq", min=1, max=LENGTH)}}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (GPT(GPT_TOY) if name == "gpt" else Llama(LLAMA_TOY)).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 32, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def dynamic(model: nn.Module, ids: Tensor) -> Program:
    return bw.capture(model, (ids,), dynamic_shapes=SEQ)


def stepwise(session: Any, ids: Tensor, first: int) -> Tensor:
    """The logits of a prompt, then of one token after the other."""
    parts = [session(ids[:, :first])]
    parts += [session(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
    return torch.cat(parts, dim=1)


def test_golden(ids: Tensor, golden: Callable[[str, str], None]) -> None:
    program = dynamic(model_of("llama"), ids)
    new, (step,) = run_passes(program, [KVCache(length=LENGTH)], [[ids]])
    golden("kv_cache", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("gpt", "eager"),
        ("llama", "eager"),
        ("llama", "onnxruntime"),
        pytest.param("gpt", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
    ],
)
def test_calls_continue_each_other(name: str, backend: str, ids: Tensor, tmp_path: Path) -> None:
    model = model_of(name)
    engine = bw.compile(
        model, passes=[KVCache(length=LENGTH)], example_inputs=(ids,), dynamic_shapes=SEQ,
        backend=backend,
    )  # fmt: skip
    with torch.no_grad():
        whole = model(ids)
    for first in (1, 5, LENGTH):
        torch.testing.assert_close(
            stepwise(engine.session(), ids, first), whole, rtol=1e-5, atol=1e-5
        )
    engine.save(tmp_path / "cached.bw")
    again = bw.load(tmp_path / "cached.bw").session()
    torch.testing.assert_close(stepwise(again, ids, 7), whole, rtol=1e-5, atol=1e-5)
    again.reset()
    torch.testing.assert_close(stepwise(again, ids, 7), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_is_part_of_the_file_by_one_number_per_slot(ids: Tensor) -> None:
    new, _ = run_passes(dynamic(model_of("gpt"), ids), [KVCache(length=LENGTH)], [[ids]])
    slots = [slot.name for slot in new.state]
    assert sum("keys" in name for name in slots) == GPT_TOY.depth
    assert all(new.tensors[name].numel() == 1 for name in slots)
    sizes = [tuple(tensor.shape) for name, tensor in new.initial_state().items() if "keys" in name]
    assert sizes == [(2, 2, LENGTH, 4)] * GPT_TOY.depth


def test_keys_are_cached_once_per_kv_head(ids: Tensor) -> None:
    new, _ = run_passes(dynamic(model_of("llama"), ids), [KVCache(length=LENGTH)], [[ids]])
    state = new.initial_state()
    (keys, *_) = [tensor for name, tensor in state.items() if "keys" in name]
    assert keys.shape == (2, LLAMA_TOY.kv_heads, LENGTH, 4)


def test_a_full_cache_says_so_and_stays_as_it_was(ids: Tensor) -> None:
    engine = bw.compile(
        model_of("llama"), passes=[KVCache(length=LENGTH)], example_inputs=(ids,),
        dynamic_shapes=SEQ, backend="eager",
    )  # fmt: skip
    session = engine.session()
    session(ids[:, : LENGTH - 1])
    with pytest.raises(OptionError, match="room for 12 tokens, and this call has more"):
        session(ids[:, :2])
    last = session(ids[:, LENGTH - 1 :])
    session.reset()
    torch.testing.assert_close(last, session(ids)[:, -1:])


def test_rows_may_begin_at_different_places(ids: Tensor) -> None:
    model = model_of("llama")
    engine = bw.compile(
        model, passes=[KVCache(length=LENGTH, padded=True)], example_inputs=(ids,),
        dynamic_shapes=SEQ, backend="eager",
    )  # fmt: skip
    starts = torch.tensor([0, 3])
    session = engine.session()
    parts = [session(ids[:, a:b], starts=starts) for a, b in ((0, 6), (6, 7), (7, LENGTH))]
    found = torch.cat(parts, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(ids[:1])[0])
        torch.testing.assert_close(found[1, 3:], model(ids[1:, 3:])[0])


@pytest.mark.parametrize("passes", [
    [FuseProjections(), QuantizeWeights(bits=8), KVCache(length=LENGTH)],
    pytest.param([KVCache(length=LENGTH), QuantizeWeights(bits=8)], marks=pytest.mark.slow),
], ids=["before", "behind"])  # fmt: skip
def test_goes_with_other_passes(passes: list[Any], ids: Tensor) -> None:
    model = model_of("llama")
    rest = [p for p in passes if not isinstance(p, KVCache)]
    options = {"example_inputs": (ids,), "dynamic_shapes": SEQ, "backend": "eager"}
    plain = bw.compile(model, passes=rest, **options)
    cached = bw.compile(model, passes=passes, **options)
    torch.testing.assert_close(stepwise(cached.session(), ids, 4), plain(ids), rtol=1e-4, atol=1e-5)


def test_models_of_transformers(ids: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
             "sliding_window": 4, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**small)).eval()
    given = {"input_ids": ids, "use_cache": False}
    engine = bw.compile(
        model, passes=[Canonicalize(), KVCache(length=LENGTH)], example_inputs=given,
        dynamic_shapes={"input_ids": SEQ["tokens"], "use_cache": None}, backend="eager",
    )  # fmt: skip
    session = engine.session()
    logits = stepwise(lambda x: session(input_ids=x, use_cache=False).logits, ids, 5)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**given).logits)


@pytest.mark.parametrize(("build", "shapes", "options", "reason"), [
    (lambda: model_of("gpt"), None, {}, "capture with a dynamic one"),
    (lambda: model_of("gpt"), {"tokens": {0: Dim("batch", min=1, max=4), 1: SEQ["tokens"][1]}}, {},
     "captured for any batch"),
    (lambda: model_of("gpt"), {"tokens": {1: Dim("seq", min=2, max=LENGTH)}}, {}, "min=1"),
    (lambda: model_of("gpt"), SEQ, {"padded": True}, "no rotary positions"),
    (lambda: model_of("gpt"), SEQ, {"length": 8}, "more tokens than the 8"),
    (lambda: model_of("gpt"), SEQ, {"length": 99}, "has 16 positions, the cache 99"),
])  # fmt: skip
def test_declines(
    build: Callable[[], nn.Module], shapes: Any, options: dict[str, Any], reason: str, ids: Tensor
) -> None:
    program = bw.capture(build(), (ids,), dynamic_shapes=shapes)
    with pytest.raises(NoMatchError, match=reason):
        run_passes(program, [KVCache(**{"length": LENGTH, **options})], [[ids]])


def test_declines_encoders() -> None:
    model = Bert(BERT).eval()
    inputs = model.example_inputs()
    seq = Dim("seq", min=1, max=16)
    program = bw.capture(model, inputs, dynamic_shapes=({1: seq},) * 3)
    with pytest.raises(NoMatchError, match="it must be causal, and nothing else"):
        run_passes(program, [KVCache(length=16)], [list(inputs)])


class Counts(nn.Module):
    """A decoder that also looks at how many tokens there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("gpt")

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.inner(tokens)
        return scores * torch.ones_like(tokens).cumsum(1)[..., None]


def test_what_counts_tokens_unseen_is_refused(ids: Tensor) -> None:
    with pytest.raises(VerifyError, match="token by token the model gives something else"):
        run_passes(dynamic(Counts(), ids), [KVCache(length=LENGTH)], [[ids]])


def test_refuses_bad_options() -> None:
    with pytest.raises(OptionError, match="room for no token"):
        KVCache(length=0)
