"""HardAttention: the largest probabilities and nothing else, exact where that is all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.passes import HardAttention
from blockwright.passes.shared.hard import hard_attention, keep_largest
from blockwright.testing.families import FAMILIES, family


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [HardAttention(top_k=3)], [[tokens]])
    golden("hard_attention", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def by_hand(p: Tensor, top_k: int) -> Tensor:
    """Row by row, by sorting."""
    rows = p.flatten(0, -2)
    hard = torch.zeros_like(rows)
    for row, values in enumerate(rows):
        for key in sorted(range(len(values)), key=lambda key: -values[key])[:top_k]:
            hard[row, key] = values[key]
    return hard.view_as(p)


def test_rows_keep_their_largest_entries_as_they_are() -> None:
    p = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(keep_largest(p, 3), by_hand(p, 3))
    assert (keep_largest(p, 3).sum(-1) < 1).all(), "rows are not renormalised"
    assert torch.equal(keep_largest(p, 7), p)
    ties = torch.full((2, 5), 0.2)
    assert (keep_largest(ties, 3) > 0).sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("masked", ["none", "bool", "added", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_with_all_keys_it_is_soft_attention(masked: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 6, 8),
        torch.randn(2, kv_heads, 6, 8),
        torch.randn(2, kv_heads, 6, 8),
    )
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    given = {"none": None, "bool": mask, "added": torch.randn(2, 1, 6, 6), "causal": None}[masked]
    options = {"is_causal": masked == "causal", "enable_gqa": kv_heads != 4}
    soft = F.scaled_dot_product_attention(q, k, v, given, **options)
    torch.testing.assert_close(hard_attention(q, k, v, given, top_k=6, **options), soft)
    torch.testing.assert_close(hard_attention(q, k, v, given, top_k=99, **options), soft)
    assert not torch.allclose(hard_attention(q, k, v, given, top_k=1, **options), soft)


def test_padding_takes_none_of_the_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    mask = torch.tensor([True, True, True, False, False, False]).expand(1, 1, 1, 6)
    padded = hard_attention(q, k, v, mask, top_k=2)
    alone = hard_attention(q, k[..., :3, :], v[..., :3, :], top_k=2)
    torch.testing.assert_close(padded, alone)
    nobody = hard_attention(q, k, v, torch.zeros_like(mask), top_k=2)
    assert torch.equal(nobody, torch.zeros_like(nobody))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "swin"])
def test_every_family(name: str) -> None:
    of_family = family(name)
    count = len(of_family.program.attentions())
    new, (step,) = run_passes(of_family.program, [HardAttention(top_k=2)], [of_family.inputs])
    assert len(step.receipt.changed) == count
    assert not any(torch.isnan(y).any() for y in run(new, of_family.inputs))


@pytest.fixture(scope="module")
def dynamic(gpt: GPT, tokens: Tensor) -> Program:
    return capture(gpt, (tokens,), dynamic_shapes=({1: Dim("seq", min=2, max=16)},))


def test_short_sequences_stay_soft(dynamic: Program) -> None:
    new, _ = run_passes(dynamic, [HardAttention(top_k=6)])
    for seq, equal in ((4, True), (6, True), (16, False)):
        x = torch.randint(0, 32, (2, seq), generator=torch.Generator().manual_seed(0))
        soft, hard = run(dynamic, [x])[0], run(new, [x])[0]
        assert torch.allclose(soft, hard, atol=1e-5) == equal


def test_declines(program: Program) -> None:
    with pytest.raises(NoMatchError, match="looks at 8 keys, 8 would be kept"):
        run_passes(program, [HardAttention(top_k=8)])
    with pytest.raises(NoMatchError, match="is excluded by pattern"):
        run_passes(program, [HardAttention(top_k=2, exclude=("*",))])


def test_refuses_bad_options() -> None:
    with pytest.raises(OptionError, match="top_k=0 leaves no key"):
        HardAttention(top_k=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_engines_compute_it(dynamic: Program, backend: str, tmp_path: Path, gpt: GPT) -> None:
    x = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    engine = bw.compile(
        gpt, [HardAttention(top_k=3)], (x[:, :8].contiguous(),), backend=backend,
        dynamic_shapes=({1: Dim("seq", min=2, max=16)},),
    )  # fmt: skip
    new, _ = run_passes(dynamic, [HardAttention(top_k=3)])
    torch.testing.assert_close(engine(x), run(new, [x])[0], atol=1e-4, rtol=1e-4)
