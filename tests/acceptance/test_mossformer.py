"""What MossFormer claims: its size and work without weights, and what each part is good for."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.models import mossformer
from blockwright.models.mossformer import MOSSFORMER_L, MossFormer, MossFormerConfig
from blockwright.passes.shared.joint import JointCore, Sides, joint_attention
from blockwright.testing.acceptance import Acceptance

pytestmark = pytest.mark.acceptance
METHOD = "mossformer"
SEEDS = (0, 1, 2)


def test_size_and_work_of_the_large_model(acceptance: Acceptance) -> None:
    with torch.device("meta"):
        model = MossFormer(MOSSFORMER_L).eval()
        inputs = model.example_inputs(batch=1)
    parameters = sum(p.numel() for p in model.parameters())
    cost = bw.capture(model, inputs).cost()
    acceptance(
        METHOD, 1, "MossFormer (L) has 42,101,834 parameters.", naive="-",
        figure=f"{parameters:,}", holds=parameters == 42_101_834,
    )  # fmt: skip
    billions = (cost.flops - cost.by_kind["elementwise"]) / 2e9
    acceptance(
        METHOD, 1, "A second at 8 kHz takes 68.7 billion multiply-adds (our count by its formula),"
        " within 1 %.",
        naive="-", holds=abs(billions / 68.7 - 1) < 0.01,
        figure=f"{billions:.1f} billion, {cost.by_kind['attention'] / 2e9:.1f} of them attention;"
        " the listing's 86.1 billion are of another length",
    )  # fmt: skip
    assert parameters == 42_101_834
    assert billions == pytest.approx(68.7, rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_attention_is_the_unfused_one(causal: bool, acceptance: Acceptance) -> None:
    worst = 0.0
    for seq in (1, 255, 256, 257, 1000):
        torch.manual_seed(seq)
        sides = Sides(*(torch.randn(1, seq, 8) for _ in range(4)))
        value = torch.randn(1, seq, 6)
        found = joint_attention(sides, value, 256, causal=causal)
        worst = max(worst, float((found - unfused(sides, value, causal)).abs().max()))
    acceptance(
        METHOD, 1, f"The attention is that of four einsums at 1, 255, 256, 257 and 1000 frames"
        f" ({'causal' if causal else 'not causal'}).",
        naive="scores of all frames", figure=f"{worst:.1e} apart", holds=worst < 1e-5,
    )  # fmt: skip
    assert worst < 1e-5


def unfused(sides: Sides, value: Tensor, causal: bool) -> Tensor:
    seq = value.shape[1]
    place = torch.arange(seq) // 256
    near, far = place[:, None] == place, place[:, None] > place
    if causal:
        near &= torch.arange(seq)[:, None] >= torch.arange(seq)
    weights = F.relu(torch.einsum("bnd,bmd->bnm", sides.query, sides.key) / 256).square() * near
    linear = torch.einsum("bnd,bmd->bnm", sides.linear_query, sides.linear_key)
    local = torch.einsum("bnm,bme->bne", weights, value)
    weights = linear * far / 256 if causal else linear / seq
    return local + torch.einsum("bnm,bme->bne", weights, value)


class Reader(nn.Module):
    """Symbols and places in, one layer of attention by either part or both, symbols out."""

    def __init__(self, symbols: int, seq: int, parts: str, dim: int = 32, chunk: int = 8) -> None:
        super().__init__()
        self.parts = parts
        self.embedding = nn.Embedding(symbols, dim)
        self.places = nn.Parameter(torch.randn(seq, dim))
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        one = torch.ones(1)
        self.core = JointCore(one, one, dim, chunk, causal=False)
        self.core.requires_grad_(True)
        self.out = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, symbols))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.places
        q, k, v = (layer(y)[:, None] for layer in (self.q, self.k, self.v))
        gain, shift = self.core.gain, self.core.shift
        sides = [side * gain[i] + shift[i] for i, side in enumerate((q, q, k, k))]
        for index in {"local": (1,), "linear": (0,), "both": ()}[self.parts]:
            sides[index] = torch.zeros_like(q)
        seen = joint_attention(Sides(*sides), v, self.core.chunk)[:, 0]
        return self.out(torch.cat((y, seen), dim=-1))


def far_symbol(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """All tokens are to say the first symbol, which only the first chunk holds."""
    x = torch.randint(8, (32, 32), generator=draw)
    return x, x[:, :1].expand(-1, 32)


def neighbour(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each token is to say the symbol three places on in its chunk, round and round."""
    x = torch.randint(8, (32, 32), generator=draw)
    return x, x.unflatten(1, (4, 8)).roll(-3, dims=2).flatten(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_part_does_what_the_other_cannot(acceptance: Acceptance) -> None:
    tasks: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {
        "far": far_symbol, "near": neighbour,
    }  # fmt: skip
    losses = {
        (task, parts): statistics.mean(learned(draw, parts, seed) for seed in SEEDS)
        for (task, draw), parts in itertools.product(tasks.items(), ("both", "local", "linear"))
    }
    for task, naive, what in (
        ("far", "local", "a symbol beyond the chunk"), ("near", "linear", "a neighbour's symbol")
    ):  # fmt: skip
        ours, theirs = losses[task, "both"], losses[task, naive]
        acceptance(
            METHOD, 2, f"Both parts together learn to say {what}, the {naive} part alone does less"
            " (400 steps, equal parameters, 3 seeds).",
            naive=f"the {naive} part alone", holds=ours < theirs,
            figure=f"{ours:.3f} against {theirs:.3f} nats",
        )  # fmt: skip
    assert losses["far", "both"] < losses["far", "local"]


def learned(
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], parts: str, seed: int
) -> float:
    """Train a reader; return its loss on new symbols, in nats."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    reader = Reader(8, 32, parts)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(400):
        x, target = draw(generator)
        loss = F.cross_entropy(reader(x).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, target = draw(generator)
        return F.cross_entropy(reader(x).flatten(0, 1), target.flatten()).item()


@pytest.mark.slow
def test_time_is_linear(acceptance: Acceptance) -> None:
    times = {}
    for seq in (2048, 8192):
        sides = Sides(*(torch.randn(1, 2, seq, 64) for _ in range(4)))
        value = torch.randn(1, 2, seq, 64)
        times["joint", seq] = seconds(lambda s=sides, v=value: joint_attention(s, v, 256))  # type: ignore[misc]
        times["full", seq] = seconds(
            lambda s=sides, v=value: F.relu(s.query @ s.key.mT / 256).square() @ v  # type: ignore[misc]
        )
    joint, full = (times[kind, 8192] / times[kind, 2048] for kind in ("joint", "full"))
    acceptance(
        METHOD, 3, "Four times the frames take at most 4.5 times the CPU time, and 10 times or more"
        " with scores of all frames.",
        naive="squared scores of all frames", figure=f"{joint:.1f} and {full:.1f} times",
        holds=joint <= 4.5 and full >= 10,
    )  # fmt: skip
    assert joint < full


def seconds(call: Callable[[], object]) -> float:
    """CPU time of the fastest of five calls."""
    call()
    found = []
    for _ in range(5):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_voices_of_sinusoids(monkeypatch: pytest.MonkeyPatch, acceptance: Acceptance) -> None:
    whole = mossformer.joint_attention
    found = {}
    for parts in ("both", "local", "linear"):

        def attend(q: Tensor, q2: Tensor, k: Tensor, k2: Tensor, v: Tensor, chunk: int,
                   parts: str = parts) -> Tensor:  # fmt: skip
            q = torch.zeros_like(q) if parts == "linear" else q
            q2 = torch.zeros_like(q2) if parts == "local" else q2
            return whole(q, q2, k, k2, v, chunk)

        monkeypatch.setattr(mossformer, "joint_attention", attend)
        found[parts] = statistics.mean(separated(seed) for seed in SEEDS)
    best = max(found["local"], found["linear"])
    acceptance(
        METHOD, 4, "Two sinusoids are told apart better by both parts than by either (150 steps,"
        " 3 seeds).",
        naive="the better of the two parts alone", holds=found["both"] >= best,
        figure=", ".join(f"{name} {value:.2f} dB" for name, value in found.items()),
    )  # fmt: skip
    assert found["both"] > 0


def separated(seed: int) -> float:
    """Train a small MossFormer on pairs of sinusoids; return the SI-SDR of new ones, in dB."""
    torch.manual_seed(seed)
    config = MossFormerConfig(dim=32, qk_dim=16, depth=2, chunk=16, rotary_dim=8, smoothing=5)
    model = MossFormer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(150):
        voices = sinusoids(generator)
        loss = -si_sdr(model(voices.sum(1)), voices).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        voices = sinusoids(generator)
        return si_sdr(model(voices.sum(1)), voices).mean().item()


def sinusoids(generator: torch.Generator) -> Tensor:
    """A low and a high voice of random pitch and phase, 512 samples."""
    pitch = torch.rand(8, 2, 1, generator=generator) * 0.2 + torch.tensor([0.1, 0.6])[:, None]
    phase = 6.3 * torch.rand(8, 2, 1, generator=generator)
    return (pitch * torch.arange(512) + phase).sin()


def si_sdr(found: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant ratio of signal to distortion, mean over voices, of the better order."""

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        shadow = (a * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True) * b
        noise = (a - shadow).square().sum(-1) + 1e-8
        return (10 * ((shadow.square().sum(-1) + 1e-8) / noise).log10()).mean(1)

    return torch.maximum(ratio(found, truth), ratio(found, truth.flip(1)))
