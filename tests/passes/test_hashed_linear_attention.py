"""HashedLinearAttention: codes learned layer by layer, attention in linear time, rows of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import dit, llama, vit
from blockwright.passes import HashedLinearAttention
from blockwright.passes.shared.cores import fit_in_order
from blockwright.passes.shared.hash_fit import HashFit, similarity
from blockwright.passes.shared.hashing import Hash, HashedCore, attend_by_codes, binary, features

SMALL: dict[str, Any] = {
    "bits": 4, "anchors": 3, "neighbours": 2, "steps": 5, "dense_below": 0
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> vit.ViT:
    torch.manual_seed(0)
    return vit.ViT(replace(vit.TOY, depth=2)).eval()


@pytest.fixture(scope="module")
def captured(model: vit.ViT) -> tuple[Program, list[Tensor]]:
    inputs = model.example_inputs()
    return bw.capture(model, inputs), list(inputs)


def function(heads: int = 2, width: int = 8, bits: int = 6, anchors: int = 5) -> Hash:
    torch.manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(heads, anchors, width), dim=-1)
    return Hash(tokens, torch.rand(heads, 1, anchors), torch.randn(heads, bits, anchors))


def test_golden(captured: tuple[Program, list[Tensor]], golden: Callable[[str, str], None]) -> None:
    program, inputs = captured
    new, (step,) = run_passes(program, [HashedLinearAttention(**SMALL)], [inputs])
    golden("hashed_linear_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("released", [False, True])
def test_the_linear_form_is_the_quadratic_one(released: bool) -> None:
    torch.manual_seed(1)
    q, k = (binary(torch.randn(2, 3, 7, 6)) for _ in range(2))
    v = torch.randn(2, 3, 7, 4)
    weights = q @ k.mT + 7
    assert weights.min() >= 1
    quadratic = ((q @ k.mT) @ v + 7 * (v if released else v.sum(-2, keepdim=True))) / weights.sum(
        -1, keepdim=True
    )
    linear = attend_by_codes(q, k, v, released=released)
    torch.testing.assert_close(linear, quadratic, atol=1e-6, rtol=1e-5)


def test_rows_add_up_to_one_and_equal_values_come_through() -> None:
    core, value = HashedCore(function()), torch.randn(1, 2, 1, 3)
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 11, 8)
    found = core(q, k, value.expand(1, 2, 11, 3))
    torch.testing.assert_close(found, value.expand(1, 2, 9, 3))
    alone = core(q, k[:, :, :1], value)
    torch.testing.assert_close(alone, value.expand(1, 2, 9, 3))


def test_tokens_count_by_their_direction_and_in_no_order() -> None:
    core = HashedCore(function())
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    order = torch.randperm(9)
    torch.testing.assert_close(core(3 * q, 0.5 * k, v), core(q, k, v))
    torch.testing.assert_close(core(q, k[:, :, order], v[:, :, order]), core(q, k, v))
    torch.testing.assert_close(core(q[:, :, order], k, v), core(q, k, v)[:, :, order])


def test_grouped_heads_are_repeated_ones() -> None:
    core = HashedCore(function(heads=4))
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    wide = core(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(core(q, k, v), wide)


def test_codes_are_signs_and_gradients_pass_between_them() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    y = binary(x)
    assert y.tolist() == [-1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert binary(torch.tensor(torch.nan)).isnan()


def test_targets_are_the_nearest_and_the_farthest() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.1, 1.0], [-1.0, 0.0]])
    near = [[1, 0, 0, -1], [0, 1, 0, -1], [0, 0, 1, -1], [-1, 0, 0, 1]]
    assert similarity(x, x, 1).tolist() == near


@pytest.mark.parametrize("start", ["random", "eigen"])
def test_bits_are_kept_only_where_they_got_better(start: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 24, 8)
    lost = {}
    for steps in (0, 10):
        found = HashFit(4, 6, 4, start, steps, 0.5, seed=0)(x, x)
        codes = binary((features(x, found.anchors) - found.means) @ found.planes.mT)
        lost[steps] = (4 * similarity(x, x, 4) - codes @ codes.mT).square().mean()
    assert lost[10] < lost[0]
    wild = HashFit(1, 6, 4, start, 3, 1e6, seed=0)(x, x)
    calm = HashFit(1, 6, 4, start, 0, 1e6, seed=0)(x, x)
    worse = [
        (similarity(x, x, 4) * (c @ c.mT)).sum((0, 2, 3))
        for f in (wild, calm)
        for c in [binary((features(x, f.anchors) - f.means) @ f.planes.mT)]
    ]
    assert (worse[0] >= worse[1]).all(), "a bit that got worse is given up"


def test_layers_are_fitted_behind_those_fitted_before(
    captured: tuple[Program, list[Tensor]],
) -> None:
    program, inputs = captured
    method = HashedLinearAttention(**SMALL)
    _, (step,) = run_passes(program, [method], [inputs])
    codes = [step.plan.decisions[attention.label] for attention in program.attentions()]
    fit = HashFit(4, 3, 2, "random", 5, 0.5, seed=0)
    seen: list[Hash] = []

    def look(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        seen.append(fit(query, key))
        return method.replace(attention, step.plan.decisions[attention.label])

    fit_in_order(program, program.attentions(), inputs, look)
    for learned, again in zip(codes, seen, strict=True):
        torch.testing.assert_close(torch.tensor(learned.anchors), again.anchors)
        torch.testing.assert_close(torch.tensor(learned.planes), again.planes)


@pytest.mark.parametrize("share", ["none", "query", "key", "mean"])
@pytest.mark.parametrize("offset", ["kernel", "released"])
def test_fires(captured: tuple[Program, list[Tensor]], share: str, offset: str) -> None:
    program, inputs = captured
    method = HashedLinearAttention(**SMALL, share=share, offset=offset)
    new, (step,) = run_passes(program, [method], [inputs])
    assert len(step.receipt.changed) == 2
    assert not new.attentions()
    assert len(new.blocks()) == 2
    assert run(new, inputs)[0].isfinite().all()


def test_the_mean_of_projections_is_the_projection() -> None:
    torch.manual_seed(0)
    model = vit.ViT(replace(vit.TOY, depth=1)).eval()
    with torch.no_grad():
        for attention in (block.attention for block in model.blocks):
            q, k, _ = attention.qkv.weight.chunk(3)
            k.copy_(q + 0.0)
            bias = attention.qkv.bias.chunk(3)
            bias[1].copy_(bias[0])
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    results = []
    for share in ("query", "key", "mean", "none"):
        method = HashedLinearAttention(**SMALL, share=share)
        new, _ = run_passes(program, [method], [list(inputs)])
        results.append(run(new, list(inputs))[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_cost_is_linear_in_tokens() -> None:
    flops = []
    for side in (16, 32):  # 1,024 and 4,096 tokens after patches of one
        with torch.device("meta"):
            net = dit.DiT(dit.DiTConfig(latent=2 * side, dim=64, heads=2, depth=1, ffn_dim=64))
            example = net.eval().example_inputs(batch=1)
        program = bw.capture(net, example)
        new, _ = run_passes(program, [HashedLinearAttention()])
        flops.append(new.cost().by_kind["attention"])
        assert program.cost().by_kind["attention"] == 4 * side**4 * 64
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.01)


def test_recovery_trains_through_the_signs(captured: tuple[Program, list[Tensor]]) -> None:
    program, inputs = captured
    method = HashedLinearAttention(**SMALL, rate=1e-2)
    apart = []
    for steps in (0, 20):
        recover = Recover(steps=steps) if steps else False
        new, (step,) = run_passes(program, [method], calibration=[inputs] * 2, recover=recover)
        apart.append((run(new, inputs)[0] - run(program, inputs)[0]).norm())
    assert apart[1] < apart[0]
    (training,) = step.receipt.trained
    assert training.after < training.before
    assert training.parameters == 2 * (24 * 8 + 24 + 8 * 8 + 8)
    old = program.tensors["blocks.0.attention.qkv.weight"]
    queries = (new.tensors["blocks.0.attention.qkv.weight"] - old)[:8]
    assert queries.abs().max() > 0, "gradients reach the queries"


def test_codes_are_learned_from_something(captured: tuple[Program, list[Tensor]]) -> None:
    with pytest.raises(OptionError, match="no calibration inputs to learn codes from"):
        run_passes(captured[0], [HashedLinearAttention(**SMALL)])


def test_declines(captured: tuple[Program, list[Tensor]], program: Program) -> None:
    vision, _ = captured
    few = {**SMALL, "neighbours": 3}
    for of, options, said in (
        (vision, {}, "looks at 5 keys, below 65 attention stays dense"),
        (vision, few, "looks at 5 keys: too few for 3 anchors and twice 3 neighbours"),
        (vision, {**SMALL, "exclude": ("*",)}, "is excluded by pattern"),
        (program, SMALL, r"is masked \(causal\)"),
    ):
        with pytest.raises(NoMatchError, match=said):
            run_passes(of, [HashedLinearAttention(**options)])


def test_rotated_and_grouped_queries_share_no_projection() -> None:
    model = llama.Llama(llama.TOY).eval()
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    with pytest.raises(NoMatchError, match="is masked"):
        run_passes(program, [HashedLinearAttention(**SMALL, share="query")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 0}, "bits=0"),
        ({"anchors": 0}, "anchors=0"),
        ({"steps": -1}, "steps=-1"),
        ({"share": "value"}, "share=value is not supported"),
        ({"offset": "none"}, "offset=none is not supported"),
        ({"start": "luck"}, "start=luck is not supported"),
        ({"rate": 0.0}, "are to be positive"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        HashedLinearAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_compute_it(
    model: vit.ViT, captured: tuple[Program, list[Tensor]], backend: str, tmp_path: Path
) -> None:
    program, inputs = captured
    method = HashedLinearAttention(**SMALL)
    new, _ = run_passes(program, [method], [inputs])
    engine = bw.compile(model, [method], tuple(inputs), backend=backend)
    engine.save(tmp_path / "model.bw")
    for one in (engine, bw.load(tmp_path / "model.bw")):
        torch.testing.assert_close(one(*inputs), run(new, inputs)[0], atol=1e-4, rtol=1e-4)
