"""JointAttention: two parts that are what they say, at every length, and cost linear in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import dit, mossformer, vit
from blockwright.models.gpt import GPT
from blockwright.passes import JointAttention
from blockwright.passes.shared.joint import JointCore, Sides, factors, joint_attention

SMALL: dict[str, Any] = {"chunk": 3, "dense_below": 0}


def drawn(seq: int, heads: int = 2, width: int = 4, wide: int = 5) -> tuple[Sides, Tensor]:
    torch.manual_seed(seq)
    sides = Sides(*(torch.randn(2, heads, seq, width) for _ in range(4)))
    return sides, torch.randn(2, heads, seq, wide)


def spelled_out(sides: Sides, value: Tensor, chunk: int, causal: bool) -> Tensor:
    """Both parts by einsum over all tokens and masks of chunks."""
    seq = value.shape[-2]
    place = torch.arange(seq) // chunk
    same, before = place[:, None] == place, place[:, None] > place
    if causal:
        same &= torch.arange(seq)[:, None] >= torch.arange(seq)
    scores = torch.einsum("bhnd,bhmd->bhnm", sides.query, sides.key)
    weights = F.relu(scores / chunk).square() * same
    far = torch.einsum("bhnd,bhmd->bhnm", sides.linear_query, sides.linear_key)
    weights = weights + (far * before / chunk if causal else far / seq)
    return torch.einsum("bhnm,bhme->bhne", weights, value)


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [JointAttention(**SMALL)], [[tokens]])
    golden("joint_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [1, 7, 8, 9, 30])
def test_it_is_what_the_einsums_say(seq: int, causal: bool) -> None:
    sides, value = drawn(seq)
    found = joint_attention(sides, value, 8, causal=causal)
    torch.testing.assert_close(found, spelled_out(sides, value, 8, causal), atol=1e-5, rtol=1e-5)


def test_one_chunk_without_the_linear_part_is_plain() -> None:
    sides, value = drawn(6)
    alone = sides._replace(linear_query=torch.zeros_like(sides.linear_query))
    plain = F.relu(sides.query @ sides.key.mT / 6).square() @ value
    torch.testing.assert_close(joint_attention(alone, value, 6), plain)


def test_the_linear_part_knows_no_order() -> None:
    sides, value = drawn(9)
    alone = sides._replace(query=torch.zeros_like(sides.query))
    order = torch.randperm(9)
    moved = Sides(*(side[:, :, order] for side in alone))
    found = joint_attention(moved, value[:, :, order], 4)
    torch.testing.assert_close(found, joint_attention(alone, value, 4)[:, :, order])


def test_later_chunks_are_not_seen() -> None:
    sides, value = drawn(12)
    early = Sides(*(side[:, :, :7] for side in sides))
    found = joint_attention(sides, value, 4, causal=True)[:, :, :7]
    expected = joint_attention(early, value[:, :, :7], 4, causal=True)
    torch.testing.assert_close(found, expected)


def test_it_is_the_attention_of_mossformer() -> None:
    sides, value = drawn(11, heads=1)
    flat = [side[:, 0] for side in sides]
    ours = joint_attention(sides, value, 4)[:, 0]
    theirs = mossformer.joint_attention(*flat, value[:, 0], 4)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_factors_are_found_again(causal: bool) -> None:
    sides, value = drawn(13)
    local, linear = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])
    same = Sides(sides.query, sides.query, sides.key, sides.key)
    core = JointCore(local, linear, 4, 4, causal=causal)
    target = core(sides.query, sides.key, value)
    found = factors(same, value, target, 4, causal=causal)
    torch.testing.assert_close(found.float(), torch.stack((local, linear), dim=1),
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    against = factors(same, value, -target, 4, causal=causal)
    assert (against[:, 0] == 0).all(), "squares have no sign"


def test_decoders_stay_causal(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, [JointAttention(**SMALL)], [[tokens]])
    assert all(joint.causal for joint in step.plan.decisions.values())
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    (one,), (two,) = run(new, [tokens]), run(new, [changed])
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5:], two[:, 5:])


@pytest.fixture(scope="module")
def model() -> vit.ViT:
    torch.manual_seed(0)
    return vit.ViT(replace(vit.TOY, image=20, depth=2)).eval()


@pytest.fixture(scope="module")
def captured(model: vit.ViT) -> tuple[Program, list[Tensor]]:
    inputs = model.example_inputs()
    return bw.capture(model, inputs), list(inputs)


def test_fires_and_is_trained_back(captured: tuple[Program, list[Tensor]]) -> None:
    program, inputs = captured
    method = JointAttention(chunk=4, dense_below=0, rate=1e-2)
    new, (step,) = run_passes(program, [method], calibration=[inputs], recover=Recover(steps=20))
    assert len(step.receipt.changed) == 2
    assert not new.attentions()
    (training,) = step.receipt.trained
    assert training.after < 0.7 * training.before
    assert new.tensors["blocks.0.attention.joint.shift"].abs().max() > 0


def test_it_works_at_other_lengths(gpt: GPT, tokens: Tensor) -> None:
    shapes = ({1: Dim("seq", min=2, max=16)},)
    dynamic = bw.capture(gpt, (tokens,), dynamic_shapes=shapes)
    new, (step,) = run_passes(dynamic, [JointAttention(**SMALL)], [[tokens]])
    for seq in (5, 16):
        x = torch.randint(0, 32, (2, seq), generator=torch.Generator().manual_seed(seq))
        fixed, _ = run_passes(bw.capture(gpt, (x,)), [JointAttention(chunk=3, dense_below=0)],
                              plans=[step.plan])  # fmt: skip
        torch.testing.assert_close(run(new, [x])[0], run(fixed, [x])[0], atol=1e-5, rtol=1e-5)


def test_cost_is_linear_in_tokens() -> None:
    flops = []
    for side in (32, 64):
        with torch.device("meta"):
            config = dit.DiTConfig(latent=2 * side, dim=64, heads=2, depth=1, ffn_dim=64)
            net = dit.DiT(config).eval()
            inputs = net.example_inputs(batch=1)
        new, _ = run_passes(bw.capture(net, inputs), [JointAttention()])
        flops.append(new.cost().by_kind["attention"])
        tokens = side**2
        assert flops[-1] == 2 * 2 * tokens * (256 * 64 + 2 * 32 * 32)  # two heads of 32
    assert flops[1] == 4 * flops[0]


def test_declines(captured: tuple[Program, list[Tensor]]) -> None:
    program, _ = captured
    for options, said in (
        ({}, "looks at 26 keys, below 260 attention stays dense"),
        ({**SMALL, "exclude": ("*",)}, "is excluded by pattern"),
    ):
        with pytest.raises(NoMatchError, match=said):
            run_passes(program, [JointAttention(**options)])


@pytest.mark.parametrize(
    ("options", "said"), [({"chunk": 0}, "chunk=0"), ({"epochs": 0}, "epochs=0"),
                          ({"rate": 0.0}, "rate=0.0")],
)  # fmt: skip
def test_refuses_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        JointAttention(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "inductor"])
def test_engines_compute_it(
    gpt: GPT, program: Program, tokens: Tensor, backend: str, tmp_path: Path
) -> None:
    method = JointAttention(**SMALL)
    new, _ = run_passes(program, [method], [[tokens]])
    engine = bw.compile(gpt, [method], (tokens,), backend=backend)
    engine.save(tmp_path / "model.bw")
    for one in (engine, bw.load(tmp_path / "model.bw")):
        torch.testing.assert_close(one(tokens), run(new, [tokens])[0], atol=1e-4, rtol=1e-4)
