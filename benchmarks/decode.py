"""Decoding with a cache: does a token cost the same after a thousand others, and who is faster?

    python benchmarks/decode.py [--large]

One token at a time, batch 1, one thread, fp32, random weights, in the sizes of a LLaMA of 0.5
billion parameters (`--large`) or a tenth of it. Candidates: engines of `kv-cache` on ONNX Runtime
and Inductor, and `transformers` with its static cache under `torch.compile`. Each continues a
sequence of its own; rounds at 64 and at 960 tokens show what the length costs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch.export import Dim

import blockwright as bw
from blockwright.backends.engine import Engine
from blockwright.driver.measure import compare
from blockwright.models.llama import Llama, LlamaConfig

LENGTH, ROUNDS = 1024, 9
SMALL = LlamaConfig(
    vocab=8000, context=LENGTH, dim=512, heads=8, kv_heads=2, head_dim=64, depth=8, ffn_dim=1536,
    tied=True,
)  # fmt: skip
LARGE = LlamaConfig(
    vocab=32000, context=LENGTH, dim=896, heads=14, kv_heads=2, head_dim=64, depth=24, ffn_dim=4864,
    tied=True,
)  # fmt: skip
Step = Callable[[], object]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LARGE if "--large" in sys.argv[1:] else SMALL
    engines = {name: engine_of(config, name) for name in ("onnxruntime", "inductor")}
    print(json.dumps([measure(config, engines, begin) for begin in (64, 960)], indent=2))


def measure(config: LlamaConfig, engines: dict[str, Engine], begin: int) -> dict[str, Any]:
    """Compare one token of each, after `begin` others."""
    steps: dict[str, Step] = {name: decode(engine, begin) for name, engine in engines.items()}
    found = compare({"transformers": peer(config, begin), **steps}, rounds=ROUNDS)
    rows = {
        name: {"ms": round(timing.median_ms, 2), "speedup": round(timing.speedup, 2)}
        for name, timing in found.timings.items()
    }
    return {
        "tokens before": begin,
        **rows,
        "noise": round(found.noise, 2),
        "verdict": found.verdict,
    }


def engine_of(config: LlamaConfig, backend: str) -> Engine:
    """Compile a decoder with a cache of `LENGTH` tokens."""
    torch.manual_seed(0)
    return bw.compile(
        Llama(config).eval(), [bw.KVCache(length=LENGTH)], (torch.zeros(1, 8, dtype=torch.int64),),
        dynamic_shapes={"tokens": {1: Dim("seq", min=1, max=LENGTH)}}, backend=backend,
        options={"threads": 1},
    )  # fmt: skip


def decode(engine: Engine, begin: int) -> Step:
    """Return a call that decodes the next token of a session; a full one is begun again."""
    session, prompt = engine.session(), torch.zeros(1, begin, dtype=torch.int64)
    token = prompt[:, :1]
    session(prompt)
    calls = count(begin)

    def step() -> object:
        if (
            next(calls) % (LENGTH - begin) == LENGTH - begin - 1
        ):  # never more than there is room for
            session.reset()
            session(prompt)
        return session(token)

    return step


def peer(config: LlamaConfig, begin: int) -> Step:
    """Return the same for `transformers`: static cache, `torch.compile`d forward."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    sizes = Config(
        vocab_size=config.vocab, hidden_size=config.dim, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        intermediate_size=config.ffn_dim, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(sizes).eval()
    cache = StaticCache(config=sizes, max_cache_len=LENGTH)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    token, place = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([begin])
    with torch.no_grad():
        model(
            torch.zeros(1, begin, dtype=torch.int64),
            past_key_values=cache,
            cache_position=torch.arange(begin),
        )

    def step() -> object:
        with torch.no_grad():
            return compiled(token, past_key_values=cache, cache_position=place)

    return step


if __name__ == "__main__":
    main()
