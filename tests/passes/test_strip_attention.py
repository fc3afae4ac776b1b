"""StripAttention: cells and thin heads, equal where a cell's tokens are, never worse with more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention
from blockwright.ir.run import run
from blockwright.models import dit, vit
from blockwright.passes import StripAttention
from blockwright.passes.shared.strips import Strip, square, thin


def drawn(**sizes: Any) -> vit.ViT:
    """A ViT with weights none of which is small."""
    torch.manual_seed(0)
    model = vit.ViT(replace(vit.TOY, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def model() -> vit.ViT:
    return drawn(image=20, depth=2)  # 5 x 5 patches behind a class token


@pytest.fixture(scope="module")
def captured(model: vit.ViT) -> tuple[Program, list[Tensor]]:
    inputs = model.example_inputs()
    return bw.capture(model, inputs), list(inputs)


@pytest.fixture(scope="module")
def attention(captured: tuple[Program, list[Tensor]]) -> Attention:
    return captured[0].attentions()[0]


def test_golden(captured: tuple[Program, list[Tensor]], golden: Callable[[str, str], None]) -> None:
    program, inputs = captured
    new, (step,) = run_passes(program, [StripAttention()], [inputs])
    golden("strip_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("local", [False, True])
def test_with_all_keys_and_channels_it_is_the_attention(attention: Attention, local: bool) -> None:
    strips = StripAttention(local=local).replace(attention, Strip(5, 5, 1, 1, 4))
    x = torch.randn(2, 26, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(strips(x), attention.replay([x])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("reduce", [2, 3, 5])
def test_equal_tokens_of_a_cell_change_nothing(
    attention: Attention, prefix: int, reduce: int
) -> None:
    """Whatever cells have been cut off at the edge, and how ever many tokens stand before."""
    torch.manual_seed(2)
    side = -(-5 // reduce)
    cells = torch.randn(2, side, side, 8)
    grid = cells.repeat_interleave(reduce, 1).repeat_interleave(reduce, 2)[:, :5, :5]
    x = torch.cat((torch.randn(2, prefix, 8), grid.flatten(1, 2)), dim=1)
    layers = attention.query, attention.key, attention.value, attention.output
    q, k, v = (x @ layer.weight.T + layer.bias for layer in layers[:3] if layer)
    heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
    y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert layers[3]
    truth = y @ layers[3].weight.T + layers[3].bias
    strips = StripAttention().replace(attention, Strip(5, 5, prefix, reduce, 4))
    assert strips.cells(x).shape[1] == prefix + side**2
    torch.testing.assert_close(strips(x), truth, atol=1e-5, rtol=1e-5)


def test_thin_projections_are_the_best_of_their_rank() -> None:
    torch.manual_seed(3)
    (query, one), (key, two) = ((torch.randn(8, 6), torch.randn(8)) for _ in range(2))
    x, y = torch.randn(2, 50, 6)
    heads = lambda z: z.unflatten(-1, (2, -1)).transpose(0, 1)  # noqa: E731
    truth = 0.5 * heads(x @ query.T + one) @ heads(y @ key.T + two).mT
    lost = []
    for channels in (1, 2, 3, 4):
        (q, qb), (k, kb) = thin((query, one), (key, two), 2, channels, 0.5)
        assert q.shape == (2 * channels, 6)
        scores = heads(x @ q.T + qb) @ heads(y @ k.T + kb).mT
        lost.append((scores - truth).norm().item())
    assert all(more < less for less, more in pairwise(lost))
    assert lost[-1] < 1e-4
    bare, _ = thin((query, None), (key, None), 2, 1, 0.5)
    assert bare[1] is None


def test_errors_fall_with_channels_and_grow_with_cells(attention: Attention) -> None:
    torch.manual_seed(4)
    coarse = torch.randn(8, 8, 3, 3)  # a smooth map: neighbours are alike
    smooth = F.interpolate(coarse, size=(5, 5), mode="bilinear", align_corners=True)
    x = torch.cat((torch.randn(8, 1, 8), smooth.flatten(2).transpose(1, 2)), dim=1)
    truth = attention.replay([x])[0]

    def lost(reduce: int, channels: int) -> float:
        strips = StripAttention().replace(attention, Strip(5, 5, 1, reduce, channels))
        return float((strips(x) - truth).norm())

    assert lost(1, 4) < lost(1, 2) < lost(1, 1)
    assert lost(1, 4) < lost(2, 4) < lost(5, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduce": 3}, {"qk_channels": 2, "kv_norm": True}, {"start": "random", "local": False},
     {"grid": (4, 6)}],
)  # fmt: skip
def test_fires(captured: tuple[Program, list[Tensor]], options: dict[str, Any]) -> None:
    program, inputs = captured
    new, (step,) = run_passes(program, [StripAttention(**options)], [inputs])
    assert len(step.receipt.changed) == 2
    assert len(new.blocks()) == 2
    assert run(new, inputs)[0].isfinite().all()
    with pytest.raises(NoMatchError, match=r"fewer keys than queries|is masked"):
        run_passes(new, [StripAttention(**options)])


def test_dit_has_no_class_token() -> None:
    model = dit.DiT(replace(dit.TOY, depth=1)).eval()
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    _, (step,) = run_passes(program, [StripAttention()])
    (strip,) = step.plan.decisions.values()
    assert strip == Strip(4, 4, 0, 2, 1)


def test_cost_is_that_of_the_cells() -> None:
    with torch.device("meta"):
        model = dit.DiT(replace(dit.DIT_S2, depth=1)).eval()
        inputs = model.example_inputs(batch=1)
    program = bw.capture(model, inputs)
    new, _ = run_passes(program, [StripAttention(local=False)])
    tokens, cells, dim, heads = 256, 64, 384, 6
    assert new.cost().by_kind["attention"] == 2 * tokens * cells * (heads + dim)
    strips = 2 * (tokens * dim * (heads + dim) + cells * dim * (heads + dim))
    old = 2 * 4 * tokens * dim**2
    assert program.cost().by_kind["linear"] - new.cost().by_kind["linear"] == old - strips


def test_square_grids() -> None:
    assert square(196) == (14, 0)
    assert square(197) == (14, 1)
    assert square(198) is None
    assert square(1) == (1, 0)
    assert square(0) is None


def test_recovery_trains_what_is_new(captured: tuple[Program, list[Tensor]]) -> None:
    program, inputs = captured
    method = StripAttention(rate=1e-2)
    new, (step,) = run_passes(program, [method], calibration=[inputs], recover=Recover(steps=20))
    (training,) = step.receipt.trained
    assert training.after < training.before
    for name in ("reduce", "local", "query.weight"):
        tensor = new.tensors[f"blocks.0.attention.{name}"]
        assert tensor.std() > 0


def test_declines(captured: tuple[Program, list[Tensor]], program: Program) -> None:
    vision, _ = captured
    for of, options, said in (
        (program, {}, r"is masked \(causal\)"),
        (vision, {"exclude": ("*",)}, "is excluded by pattern"),
        (vision, {"reduce": 1, "qk_channels": 4}, "has nothing to reduce"),
        (vision, {"grid": (6, 6)}, "has 26 tokens, fewer than a grid of 6 x 6"),
    ):
        with pytest.raises(NoMatchError, match=said):
            run_passes(of, [StripAttention(**options)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduce": 0}, "reduce=0"),
        ({"qk_channels": 0}, "qk_channels=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"grid": (0, 4)}, "has no tokens"),
        ({"start": "luck"}, "start=luck is not supported"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        StripAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_compute_it(
    model: vit.ViT, captured: tuple[Program, list[Tensor]], backend: str, tmp_path: Path
) -> None:
    program, inputs = captured
    new, _ = run_passes(program, [StripAttention()], [inputs])
    engine = bw.compile(model, [StripAttention()], tuple(inputs), backend=backend)
    engine.save(tmp_path / "model.bw")
    for one in (engine, bw.load(tmp_path / "model.bw")):
        torch.testing.assert_close(one(*inputs), run(new, inputs)[0], atol=1e-4, rtol=1e-4)
