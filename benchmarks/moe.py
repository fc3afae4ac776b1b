"""Routed experts against the dense network they come from, in the same engine, on one thread.

    python benchmarks/moe.py [ENGINE ...]           eager, onnxruntime, inductor; all when left out

Width 768, four times as many hidden neurons: dense, or one shared expert of a quarter of them and
12 experts of a sixteenth each, of which a token visits 2. That is 37.5 % of the work. `moe` is the
whole layer; `shared` and `router` are what of it the shared expert and the choice of experts take,
and `experts` the rest: sorting, products, combining. Rounds are interleaved, CPU time.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import blockwright as bw
from blockwright.driver.measure import Comparison, compare

DIM, SHARED, EXPERTS, WIDTH, K = 768, 768, 12, 192, 2
DENSE = SHARED + EXPERTS * WIDTH
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TARGET_TOKENS = 512
ENGINES = ("eager", "onnxruntime", "inductor")


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, width), nn.Linear(width, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = self.layer(x).softmax(-1).topk(K, -1)
        return weight, index


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, DIM) / DIM**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        weights = (None, self.up, None, None, self.down, None)
        return torch.ops.blockwright.moe_ffn(x, index, weight, *weights, "gelu")


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.router, self.experts = FeedForward(SHARED), Router(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.experts(x, *self.router(x))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    engines = sys.argv[1:] or ENGINES
    print(json.dumps({engine: measure(engine) for engine in engines}, indent=2))


def measure(engine: str) -> dict[str, Any]:
    model = MixtureOfExperts().eval()
    parts = {
        "dense": FeedForward(DENSE).eval(),
        "moe": model,
        "shared": model.shared,
        "router": model.router,
    }
    calls = {name: compiled(part, engine, torch.randn(16, DIM)) for name, part in parts.items()}
    routed = compiled(model.experts, engine, *visits(16, skewed=False))
    curve = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, DIM)
        curve[tokens] = shares(compare({n: partial(c, x) for n, c in calls.items()}, rounds=9))
    routings = {
        name: partial(routed, *visits(TARGET_TOKENS, skewed=name == "skewed"))
        for name in ("uniform", "skewed")
    }
    skew = compare(routings, rounds=9)
    slowdown = 1 / skew.timings["skewed"].speedup
    return {"curve": curve, "skewed over uniform": round(slowdown, 3), "verdict": skew.verdict}


def compiled(model: nn.Module, engine: str, *inputs: Tensor) -> bw.Engine:
    tokens = {0: Dim("tokens", min=1, max=2048)}
    return bw.compile(
        model,
        [],
        inputs,
        dynamic_shapes=(tokens,) * len(inputs),
        backend=engine,
        options={"threads": 1},
    )


def visits(tokens: int, *, skewed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, weights and experts: all tokens on the same experts, or any."""
    index = torch.rand(tokens, EXPERTS).topk(K, dim=-1).indices
    if skewed:
        index = torch.arange(K).repeat(tokens, 1)
    return torch.randn(tokens, DIM), torch.rand(tokens, K), index


def shares(result: Comparison) -> dict[str, Any]:
    """Return times as shares of the dense network's, medians over rounds."""
    share = {name: round(1 / timing.speedup, 3) for name, timing in result.timings.items()}
    low, high = result.timings["moe"].interval
    share["experts"] = round(share["moe"] - share["shared"] - share["router"], 3)
    dense = round(result.timings["dense"].median_ms, 3)
    interval = [round(1 / high, 3), round(1 / low, 3)]
    return {"dense_ms": dense, **share, "interval": interval, "verdict": result.verdict}


if __name__ == "__main__":
    main()
