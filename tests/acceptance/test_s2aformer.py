"""What S2AFormer claims, of attentions as we reconstruct them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.s2aformer import RECONSTRUCTED_TINY, S2AFormer, StripSelfAttention
from blockwright.passes import PruneHeads, StripAttention
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "s2aformer"


def macs(tokens: int, dim: int, heads: int, reduce: int) -> int:
    """Multiply-adds of one strip attention: projections, cells, scores and values."""
    cells = tokens // reduce**2
    projections = tokens * dim * heads + cells * dim * heads + cells * dim**2 + tokens * dim**2
    return projections + tokens * dim + tokens * cells * (heads + dim)


def test_multiply_adds_per_layer(acceptance: Acceptance) -> None:
    config, millions, whole = RECONSTRUCTED_TINY, [], []
    stages = zip(config.widths, config.heads, config.reductions, (56, 28, 14, 7), strict=True)
    for dim, heads, reduce, side in stages:
        with torch.device("meta"):
            layer = StripSelfAttention(dim, heads, reduce, 1).eval()
            x = torch.empty(1, dim, side, side)
        kinds = bw.capture(layer, (x,)).cost().by_kind
        counted = sum(n for kind, n in kinds.items() if kind != "elementwise") // 2
        assert counted == macs(side**2, dim, heads, reduce)
        millions.append(round(counted / 1e6, 1))
        whole.append(round((4 * side**2 * dim**2 + 2 * side**4 * dim) / 1e6, 1))
    acceptance(
        METHOD, 1, "A strip attention of the four stages costs 8.5, 6.1, 8.1 and 7.3 million"
        " multiply-adds (our widths, 224 pixels).",
        naive="softmax attention over all pixels", holds=millions == [8.5, 6.1, 8.1, 7.3],
        figure=", ".join(f"{a} against {b}" for a, b in zip(millions, whole, strict=True))
        + " million",
    )  # fmt: skip
    assert millions == [8.5, 6.1, 8.1, 7.3]


def test_the_reconstruction_runs_at_its_sizes() -> None:
    with torch.device("meta"):
        model = S2AFormer(RECONSTRUCTED_TINY).eval()
        inputs = model.example_inputs(batch=1)
    program = bw.capture(model, inputs)
    assert len(program.attentions()) == sum(RECONSTRUCTED_TINY.depths)
    attention = program.cost().by_kind["attention"]
    assert attention < 2 * 2 * (11e6)  # eight layers, none of which sees all pixels


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_low_rank_is_a_better_start(toy_vit: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_vit.model, toy_vit.example_inputs)
    inputs = list(toy_vit.example_inputs)
    truth = run(program, inputs)[0]

    def lost(*passes: object) -> float:
        new, _ = run_passes(program, list(passes), [inputs], recover=False)
        return float((run(new, inputs)[0] - truth).norm() / truth.norm())

    thin = {c: lost(StripAttention(reduce=1, qk_channels=c)) for c in (1, 2, 4, 8)}
    drawn = statistics.mean(
        lost(StripAttention(reduce=1, qk_channels=4, start="random", seed=s)) for s in (0, 1, 2)
    )
    cut = lost(PruneHeads(keep_ratio=0.5, importance="magnitude"))
    acceptance(
        METHOD, 2, "Thin queries and keys (4 of 16 channels, untrained) lose less by their best low"
        " rank than drawn at random (3 seeds).",
        naive="random thin projections", holds=thin[4] < drawn,
        figure=f"{thin[4]:.3f} against {drawn:.3f} relative error of the logits",
    )  # fmt: skip
    acceptance(
        METHOD, 2, "They lose less than half of the heads, which saves no fewer multiply-adds.",
        naive="PruneHeads, by magnitude", holds=thin[4] < cut,
        figure=f"{thin[4]:.3f} against {cut:.3f} relative error of the logits",
    )  # fmt: skip
    cells = {r: lost(StripAttention(reduce=r, qk_channels=16)) for r in (2, 4)}
    falls = thin[1] > thin[2] > thin[4] > thin[8] and cells[2] < cells[4]
    acceptance(
        METHOD, 2, "The error falls with channels and grows with the size of cells.",
        naive="-", holds=falls,
        figure=", ".join(f"{v:.3f} at c={c}" for c, v in thin.items())
        + "; " + ", ".join(f"{v:.3f} at r={r}" for r, v in cells.items()),
    )  # fmt: skip
    assert thin[4] < drawn
    assert falls


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_distilled_strips(toy_vit: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_vit.model, toy_vit.example_inputs)
    calibration = [list(batch) for batch in toy_vit.calibration(80)]
    found, cost = {}, {}
    for name, channels in (("strip", 1), ("whole channels", 16)):
        method = StripAttention(reduce=2, qk_channels=channels)
        new, _ = run_passes(program, [method], calibration=calibration, recover=Recover(steps=80))
        found[name] = 100 * quality(toy_vit, new)
        cost[name] = attention_flops(new)
    saved = attention_flops(program) / cost["strip"]
    acceptance(
        METHOD, 3, "Distilled for 80 steps, strips of one channel are as accurate as cells with"
        " whole heads, within 1 point, at 1.8 times fewer FLOPs than the attention.",
        naive="spatial reduction alone, as in PVT",
        holds=found["strip"] >= found["whole channels"] - 1 and saved >= 1.8,
        figure=f"{found['strip']:.1f} against {found['whole channels']:.1f} %"
        f" (dense {100 * toy_vit.quality()['accuracy']:.1f} %); {saved:.2f} times fewer FLOPs than"
        f" dense, {cost['whole channels'] / cost['strip']:.2f} times fewer than whole channels",
    )  # fmt: skip
    assert found["strip"] > 60


def attention_flops(program: Program) -> int:
    """FLOPs below the attentions' module paths."""
    paths = program.cost().by_path
    return sum(flops for path, flops in paths.items() if ".attention" in f".{path}.".rstrip("."))


def quality(toy: Toy, program: Program) -> float:
    return toy.quality(lambda *inputs: run(program, inputs)[0])["accuracy"]


@pytest.mark.slow
def test_strips_are_faster(acceptance: Acceptance) -> None:
    torch.manual_seed(0)
    dim, side = 64, 56
    strips = StripSelfAttention(dim, 2, 8, 1).eval()
    qkv, out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def dense(x: Tensor) -> Tensor:
        q, k, v = (
            qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        )
        return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x = torch.randn(1, dim, side, side)
    with torch.no_grad():
        times = [seconds(lambda f=f: f(x)) for f in (strips, dense)]  # type: ignore[misc]
    ratio = times[1] / times[0]
    acceptance(
        METHOD, 4, "At 3,136 tokens a strip attention takes a fifth of the CPU time, or less.",
        naive="scaled_dot_product_attention over all tokens", holds=ratio >= 5,
        figure=f"{ratio:.1f} times faster",
    )  # fmt: skip
    assert ratio > 1


def seconds(call: Callable[[], object]) -> float:
    """CPU time of the fastest of five calls."""
    call()
    found = []
    for _ in range(5):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)
