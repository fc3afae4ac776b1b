"""SparseGlobalAttention: channels attend to channels, linear in tokens, over runs of a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from blockwright.ir.run import run
from blockwright.models import dit, vit
from blockwright.passes import SparseGlobalAttention
from blockwright.passes.shared.channels import (
    ChannelCore,
    attend_channels,
    nearest_temperature,
    runs,
    where,
)

SMALL: dict[str, Any] = {"dense_below": 0}


def drawn(seq: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seq)
    q, k, v = torch.randn(3, 2, 2, seq, 4)
    return q, k, v


@pytest.fixture(scope="module")
def model() -> vit.ViT:
    torch.manual_seed(0)
    return vit.ViT(replace(vit.TOY, image=20, depth=2)).eval()


@pytest.fixture(scope="module")
def captured(model: vit.ViT) -> tuple[Program, list[Tensor]]:
    inputs = model.example_inputs()
    return bw.capture(model, inputs), list(inputs)


def test_golden(captured: tuple[Program, list[Tensor]], golden: Callable[[str, str], None]) -> None:
    program, inputs = captured
    new, (step,) = run_passes(program, [SparseGlobalAttention(tile=16)], [inputs])
    golden("sparse_global_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_it_is_the_attention_of_the_paper() -> None:
    """Channels as rows, pixels as columns, as DLGSANet lays them out."""
    q, k, v = drawn()
    temperature = torch.tensor([0.5, 2.0])[:, None, None]
    rows = [x.mT for x in (q, k, v)]
    scores = F.normalize(rows[0], dim=-1) @ F.normalize(rows[1], dim=-1).mT * temperature
    paper = (F.relu(scores) @ rows[2]).mT
    torch.testing.assert_close(attend_channels(q, k, v, temperature), paper)


def test_a_temperature_scales_what_comes_out() -> None:
    q, k, v = drawn()
    one, three = (ChannelCore(torch.full((2,), t))(q, k, v) for t in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(ChannelCore(torch.ones(2))(5 * q, 2 * k, v), one)


def test_tokens_have_no_order() -> None:
    q, k, v = drawn()
    order = torch.randperm(9)
    core = ChannelCore(torch.ones(2))
    moved = core(*(x[:, :, order] for x in (q, k, v)))
    torch.testing.assert_close(moved, core(q, k, v)[:, :, order])


def test_grouped_heads_are_repeated_ones() -> None:
    q, k, v = drawn()
    wide = q.repeat_interleave(2, 1)
    core = ChannelCore(torch.ones(4))
    repeated = core(wide, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(core(wide, k, v), repeated)


def test_temperatures_are_found_again() -> None:
    q, k, v = drawn()
    temperature = torch.tensor([0.5, 2.0])
    target = ChannelCore(temperature)(q, k, v)
    torch.testing.assert_close(nearest_temperature(q, k, v, target).float(), temperature)
    assert nearest_temperature(q, k, v, -target).tolist() == [0, 0]


@pytest.mark.parametrize("tile", [1, 3, 4, 5, 8])
def test_runs_are_averaged_where_they_overlap(tile: int) -> None:
    q, k, v = drawn()
    total, often = torch.zeros_like(v), torch.zeros(9)
    for run_ in runs(9, tile):
        alone = ChannelCore(torch.ones(2))(*(x[:, :, run_] for x in (q, k, v)))
        total[:, :, run_] += alone
        often[run_] += 1
    assert often.min() >= 1
    assert often.max() <= 2
    found = ChannelCore(torch.ones(2), tile, 9)(q, k, v)
    torch.testing.assert_close(found, total / often[:, None])


@pytest.mark.parametrize("tile", [9, 100])
def test_one_run_is_the_whole_sequence(tile: int) -> None:
    q, k, v = drawn()
    whole = ChannelCore(torch.ones(2))(q, k, v)
    assert torch.equal(ChannelCore(torch.ones(2), tile, 9)(q, k, v), whole)


@pytest.mark.parametrize("seq", range(1, 30))
def test_no_token_is_in_three_runs(seq: int) -> None:
    for tile in range(1, seq + 1):
        index = runs(seq, tile)
        often = index.flatten().bincount(minlength=seq)
        assert often.min() >= 1
        assert often.max() <= 2
        assert index[0, 0] == 0
        assert index[-1, -1] == seq - 1
        assert torch.equal(index.flatten()[where(index, seq)], torch.arange(seq).expand(2, seq))


@pytest.mark.parametrize("tile", [None, 7, 16])
def test_fires_and_is_trained_back(
    captured: tuple[Program, list[Tensor]], tile: int | None
) -> None:
    program, inputs = captured
    method = SparseGlobalAttention(tile=tile, rate=1e-2)
    new, (step,) = run_passes(program, [method], calibration=[inputs], recover=Recover(steps=20))
    assert len(step.receipt.changed) == 2
    assert not new.attentions()
    (training,) = step.receipt.trained
    assert training.after < training.before
    assert run(new, inputs)[0].isfinite().all()


def test_cost_is_linear_in_tokens() -> None:
    flops = []
    for side in (16, 32):
        with torch.device("meta"):
            config = dit.DiTConfig(latent=2 * side, dim=64, heads=2, depth=1, ffn_dim=64)
            net = dit.DiT(config).eval()
            inputs = net.example_inputs(batch=1)
        new, _ = run_passes(bw.capture(net, inputs), [SparseGlobalAttention()])
        flops.append(new.cost().by_kind["attention"])
        assert flops[-1] == 2 * side**2 * 2 * 2 * 32 * 32  # two products of two heads of 32
    assert flops[1] == 4 * flops[0]


def test_declines(captured: tuple[Program, list[Tensor]], program: Program) -> None:
    vision, _ = captured
    for of, options, said in (
        (program, SMALL, r"is masked \(causal\)"),
        (vision, {"dense_below": 27}, "looks at 26 keys, below 27 attention stays dense"),
        (vision, {**SMALL, "exclude": ("*",)}, "is excluded by pattern"),
    ):
        with pytest.raises(NoMatchError, match=said):
            run_passes(of, [SparseGlobalAttention(**options)])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tile": 0}, "tile=0"), ({"epochs": 0}, "epochs=0"), ({"rate": 0.0}, "rate=0.0")],
)
def test_refuses_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SparseGlobalAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_compute_it(
    model: vit.ViT, captured: tuple[Program, list[Tensor]], backend: str, tmp_path: Path
) -> None:
    program, inputs = captured
    method = SparseGlobalAttention(tile=16)
    new, _ = run_passes(program, [method], [inputs])
    engine = bw.compile(model, [method], tuple(inputs), backend=backend)
    engine.save(tmp_path / "model.bw")
    for one in (engine, bw.load(tmp_path / "model.bw")):
        torch.testing.assert_close(one(*inputs), run(new, inputs)[0], atol=1e-4, rtol=1e-4)
