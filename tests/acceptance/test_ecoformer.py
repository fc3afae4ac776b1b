"""What EcoFormer claims: energy of PVTv2 from sizes alone, codes on made-up tokens, a toy ViT."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import dit
from blockwright.passes import HashedLinearAttention
from blockwright.passes.shared.hash_fit import HashFit
from blockwright.passes.shared.hashing import attend_by_codes, binary, features
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "ecoformer"
BITS, ANCHORS, NEIGHBOURS = 16, 25, 10
SEEDS = (0, 1, 2)


class Work(NamedTuple):
    """Multiplications and additions, and their energy at 45 nm in fp32."""

    multiplied: float
    added: float

    @property
    def joules(self) -> float:
        """Energy in units of 1e-12 J, by the counter released with EcoFormer."""
        return 3.7 * self.multiplied + 0.9 * self.added

    def plus(self, multiplied: float, added: float | None = None) -> Work:
        more = multiplied if added is None else added
        return Work(self.multiplied + multiplied, self.added + more)


def pvt_v2(widths: tuple[int, ...], depths: tuple[int, ...], *, hashed: bool) -> Work:
    """Count a PVTv2 without spatial reduction; the last stage keeps softmax attention."""
    work, side, before = Work(0, 0), 224, 3
    stages = zip(widths, depths, (1, 2, 5, 8), (8, 8, 4, 4), strict=True)
    for stage, (dim, depth, heads, ratio) in enumerate(stages):
        kernel, stride = (3, 2) if stage else (7, 4)
        side //= stride
        tokens, width = side**2, dim // heads
        work = work.plus(kernel**2 * before * dim * tokens)
        before = dim
        for _ in range(depth):
            work = work.plus(tokens * dim * ratio * (2 * dim + 9))
            if hashed and stage < 3:
                bits = ANCHORS * BITS + BITS
                work = work.plus(3 * dim**2 * tokens).plus(
                    heads * tokens * (2 * ANCHORS + bits + 1 + width),
                    heads * tokens * (2 * ANCHORS * width + bits + BITS + 2 * BITS * width + width),
                )
            else:
                products = 2 * tokens**2 * dim
                work = work.plus(4 * dim**2 * tokens)
                work = work.plus(products + heads * tokens**2, products)
    return work.plus(1000 * before)


@pytest.mark.parametrize(
    ("size", "widths", "depths", "published"),
    [
        ("B0", (32, 64, 160, 256), (2, 2, 2, 2), (9.23, 0.54, 0.56, 2.5)),
        ("B1", (64, 128, 320, 512), (2, 2, 2, 2), (23.0, 2.03, 2.09, 9.4)),
        ("B2", (64, 128, 320, 512), (3, 4, 6, 3), (39.6, 3.85, 3.97, 17.8)),
    ],
)
def test_energy_of_pvt_v2(
    size: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    published: tuple[float, ...],
    acceptance: Acceptance,
) -> None:
    soft, hashed = (pvt_v2(widths, depths, hashed=hashed) for hashed in (False, True))
    found = (soft.joules, hashed.multiplied, hashed.added, hashed.joules)
    apart = max(abs(f / 1e9 / p - 1) for f, p in zip(found, published, strict=True))
    acceptance(
        METHOD, 4, f"Operations and energy of PVTv2-{size} are the published ones, within 2 %.",
        naive="softmax attention in all layers", holds=apart < 0.02,
        figure=f"{soft.joules / 1e9:.2f} to {hashed.joules / 1e9:.2f} billion pJ,"
        f" {100 * (1 - hashed.joules / soft.joules):.1f} % saved; at most {100 * apart:.1f} % off",
    )  # fmt: skip
    assert apart < 0.02


def test_the_linear_form_is_linear_and_the_same(acceptance: Acceptance) -> None:
    torch.manual_seed(0)
    q, k = (binary(torch.randn(1, 4, 512, BITS)) for _ in range(2))
    v = torch.randn(1, 4, 512, 32)
    weights = q @ k.mT + BITS + 1
    apart = (attend_by_codes(q, k, v) - weights @ v / weights.sum(-1, keepdim=True)).abs().max()
    flops = []
    for side in (32, 64):
        with torch.device("meta"):
            config = dit.DiTConfig(latent=2 * side, dim=64, heads=2, depth=1, ffn_dim=64)
            model = dit.DiT(config).eval()
            inputs = model.example_inputs(batch=1)
        new, _ = run_passes(bw.capture(model, inputs), [HashedLinearAttention()])
        flops.append(new.cost().by_kind["attention"])
    ratio = flops[1] / flops[0]
    acceptance(
        METHOD, 3, "The linear form is the quadratic one, and costs 4 times as much at 4 times"
        " the tokens (1,024 to 4,096).",
        naive="the products of all queries and keys", holds=apart <= 1e-5 and ratio < 4.1,
        figure=f"{apart:.1e} apart; {ratio:.2f} times the FLOPs",
    )  # fmt: skip
    assert apart <= 1e-5
    assert ratio == pytest.approx(4, rel=0.02)


def clustered(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(1, 1, 14, 32).repeat_interleave(14, 2) + 0.6 * torch.randn(1, 1, 196, 32)


def judged(codes: Tensor, x: Tensor) -> tuple[float, float]:
    """Recall of the 10 nearest, and correlation of products of codes with similarities."""
    unit = F.normalize(x, dim=-1)
    true, found = unit @ unit.mT, codes @ codes.mT
    near, guessed = (scores.topk(NEIGHBOURS, dim=-1).indices for scores in (true, found))
    recall = (guessed[..., None] == near[..., None, :]).any(-1).float().mean().item()
    return recall, torch.corrcoef(torch.stack([true.flatten(), found.flatten()]))[0, 1].item()


@pytest.mark.slow
def test_learned_codes_beat_random_ones(acceptance: Acceptance) -> None:
    scores: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        x = clustered(seed)
        planes = torch.randn(32, BITS, generator=torch.Generator().manual_seed(seed))
        scores.setdefault("random planes", []).append(judged(binary(x @ planes), x))
        for name, steps, rate in (("learned", 100, 0.5), ("random bits", 0, 0.5),
                                  ("released rate", 100, 5e-4)):  # fmt: skip
            found = HashFit(BITS, ANCHORS, NEIGHBOURS, "random", steps, rate, seed)(x, x)
            codes = binary((features(x, found.anchors) - found.means) @ found.planes.mT)
            scores.setdefault(name, []).append(judged(codes, x))
    mean = {n: tuple(map(statistics.mean, zip(*s, strict=True))) for n, s in scores.items()}
    for naive in ("random planes", "random bits", "released rate"):
        gains = [a - b for a, b in zip(mean["learned"], mean[naive], strict=True)]
        acceptance(
            METHOD, 1, "Learned codes find neighbours better, by 0.1 of recall or of correlation"
            " (196 clustered tokens, 16 bits, 3 seeds).",
            naive={"random planes": "signs of random projections", "random bits": "random planes"
                   " between the same features", "released rate": "learned at the released rate,"
                   " 5e-4"}[naive],
            figure="recall {:.3f} against {:.3f}, correlation {:.3f} against {:.3f}".format(
                *(v for pair in zip(mean["learned"], mean[naive], strict=True) for v in pair)
            ),
            holds=max(gains) >= 0.1,
        )  # fmt: skip
        assert max(gains) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_learned_codes_on_a_vit(toy_vit: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_vit.model, toy_vit.example_inputs)
    inputs = list(toy_vit.example_inputs)
    truth = run(program, inputs)[0]
    calibration = [list(batch) for batch in toy_vit.calibration(60)]
    errors: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    for name, steps in (("learned", 100), ("random", 0)):
        for seed in SEEDS:
            method = HashedLinearAttention(anchors=16, neighbours=5, dense_below=0, rate=1e-3,
                                           steps=steps, seed=seed)  # fmt: skip
            new, _ = run_passes(program, [method], calibration=calibration, recover=False)
            apart = (run(new, inputs)[0] - truth).norm() / truth.norm()
            errors.setdefault(name, []).append(apart.item())
            tuned, _ = run_passes(program, [method], calibration=calibration,
                                  recover=Recover(steps=60))  # fmt: skip
            accuracy.setdefault(name, []).append(quality(toy_vit, tuned))
    for number, (what, found, better) in enumerate((
        ("before training, logits are nearer to those of softmax attention", errors, -1),
        ("after 60 steps of distillation, digits are read better", accuracy, 1),
    )):  # fmt: skip
        ours, theirs = (statistics.mean(found[name]) for name in ("learned", "random"))
        acceptance(
            METHOD, 2, f"With learned codes in all layers of a ViT, {what} (3 seeds).",
            naive="random codes of as many bits", holds=better * ours > better * theirs,
            figure=f"{ours:.3f} against {theirs:.3f}"
            + (" relative error" if not number else f" accuracy (dense {dense(toy_vit):.3f})"),
        )  # fmt: skip
    assert statistics.mean(errors["learned"]) < statistics.mean(errors["random"])
    assert min(accuracy["learned"]) > 0.8


def quality(toy: Toy, program: Program) -> float:
    return toy.quality(lambda *inputs: run(program, inputs)[0])["accuracy"]


def dense(toy: Toy) -> float:
    return toy.quality()["accuracy"]
