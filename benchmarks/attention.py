"""Attention over few blocks of keys against all of them, on one thread.

    python benchmarks/attention.py [PART ...]        op, engines, flex, model; all when left out

`op`: `block_attention`, 8 heads of 64, blocks of 64, each query block with blocks of its own, as a
share of the time of PyTorch's dense attention; the ideal is the density. `engines`: the same from
ONNX Runtime, against its own dense attention. `flex`: compiled FlexAttention with the same blocks.
`model`: a DiT over 4096 tokens, dense against `PiecewiseAttention`, end to end. Rounds are
interleaved, CPU time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.measure import Comparison, compare
from blockwright.models.dit import DiT, DiTConfig

HEADS, WIDTH, BLOCK = 8, 64, 64
TOKENS = (1024, 2048, 4096, 8192, 16384)
DENSITIES = (0.0625, 0.125, 0.25, 0.5, 0.75)
TARGET_TOKENS, TARGET_DENSITY = 4096, 0.125
MODEL = DiTConfig(latent=128, dim=384, heads=6, depth=2, ffn_dim=1536)
SCALE = WIDTH**-0.5


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parts = {"op": op, "engines": engines, "flex": flex, "model": model}
    chosen = sys.argv[1:] or parts
    print(json.dumps({name: parts[name]() for name in chosen}, indent=2))


def op() -> dict[str, Any]:
    return {tokens: at_densities(tokens) for tokens in TOKENS}


def at_densities(tokens: int) -> dict[str, Any]:
    q, k, v = qkv(tokens)
    calls: dict[str, Callable[[], object]] = {"dense": partial(dense, q, k, v)}
    for density in DENSITIES:
        calls[str(density)] = partial(sparse, q, k, v, listed(tokens, density))
    return shares(compare(calls, rounds=5 if tokens > TARGET_TOKENS else 9))


def engines() -> dict[str, Any]:
    """Compare within ONNX Runtime."""
    given, blocks = qkv(TARGET_TOKENS), listed(TARGET_TOKENS, TARGET_DENSITY)
    found = bw.compile(Dense(), [], given, backend="onnxruntime", options={"threads": 1})
    few = bw.compile(Sparse(), [], (*given, blocks), backend="onnxruntime", options={"threads": 1})
    return shares(compare({"dense": partial(found, *given), "few": partial(few, *given, blocks)}))


def flex() -> dict[str, Any]:
    """Compare with FlexAttention, compiled for the same blocks; its compilation is not counted."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attend = torch.compile(flex_attention)
    found = {}
    for tokens in TOKENS[1:4]:
        (q, k, v), blocks = qkv(tokens), listed(tokens, TARGET_DENSITY)
        counts = torch.full(blocks.shape[:3], blocks.shape[3], dtype=torch.int32)
        none, nothing = torch.zeros_like(counts), torch.zeros_like(blocks, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(
            none, nothing, counts, blocks.to(torch.int32), BLOCK_SIZE=BLOCK,
            seq_lengths=(tokens, tokens), compute_q_blocks=False,
        )  # fmt: skip
        theirs = partial(attend, q, k, v, block_mask=mask, scale=SCALE)
        ours = partial(sparse, q, k, v, blocks)
        torch.testing.assert_close(theirs(), ours(), rtol=1e-3, atol=1e-4)
        found[tokens] = shares(compare({"flex": theirs, "ours": ours}, rounds=5))
    return found


def model() -> dict[str, Any]:
    """Compare whole models in each engine."""
    dit = DiT(MODEL).eval()
    for weight in dit.parameters():
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1)
    inputs = dit.example_inputs(1)
    found = {}
    for backend in ("eager", "onnxruntime"):
        options: Mapping[str, Any] = {"backend": backend, "options": {"threads": 1}}
        whole = bw.compile(dit, [], inputs, **options)
        few = bw.compile(dit, [bw.PiecewiseAttention()], inputs, **options)
        calls = {"dense": partial(whole, *inputs), "pieces": partial(few, *inputs)}
        found[backend] = shares(compare(calls, rounds=5))
    return found


class Dense(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Sparse(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        return sparse(q, k, v, blocks)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    out: Tensor
    out, _ = torch.ops.blockwright.block_attention(q, k, v, blocks, BLOCK, BLOCK, SCALE)
    return out


def qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, HEADS, tokens, WIDTH)
    return q, k, v


def listed(tokens: int, density: float) -> Tensor:
    """Return blocks drawn for each block of queries."""
    count = tokens // BLOCK
    kept = max(1, int(density * count))
    return torch.rand(1, HEADS, count, count).topk(kept).indices


def shares(result: Comparison) -> dict[str, Any]:
    """Return times as shares of the first one's, medians over rounds."""
    share = {name: round(1 / timing.speedup, 3) for name, timing in result.timings.items()}
    return share | {"noise": round(result.noise, 2), "verdict": result.verdict}


if __name__ == "__main__":
    main()
