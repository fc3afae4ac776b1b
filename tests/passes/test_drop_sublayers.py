"""DropSublayers: norms, gates and streams around what goes; by influence, name or chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Summand
from blockwright.ir.run import run
from blockwright.models import bert
from blockwright.models.gpt import GPT
from blockwright.passes import Canonicalize, DropSublayers
from blockwright.testing.families import FAMILIES, family


def dropped(program: Program, *names: str, **options: object) -> Program:
    new, _ = run_passes(program, [DropSublayers(sublayers=names, **options)])
    return new


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    drop = DropSublayers(sublayers=("blocks.1.attention*",))
    new, (step,) = run_passes(program, [drop], [[tokens]])
    golden("drop_sublayers", f"# {step.pass_}: {step.receipt}\n{new.text()}")


class Nothing(nn.Module):
    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_before_the_norm_the_norm_goes_too(gpt: GPT, program: Program, tokens: Tensor) -> None:
    new = dropped(program, "blocks.1.attention*")
    kept, gpt.blocks[1].attention = gpt.blocks[1].attention, Nothing()
    try:
        assert torch.equal(run(new, [tokens])[0], gpt(tokens))
    finally:
        gpt.blocks[1].attention = kept
    gone = {name.split(".", 2)[2] for name in set(program.tensors) - set(new.tensors)}
    assert any("norm" in name for name in gone), gone


def test_behind_the_norm_the_norm_stays() -> None:
    torch.manual_seed(0)
    model = bert.Bert(bert.TOY).eval()
    inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    new = dropped(program, "blocks.2.attention*")
    model.blocks[2].attention = Nothing()
    for ours, theirs in zip(run(new, list(inputs)), model(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert "blocks.2.attention_norm.weight" in new.tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_what_adds_zero_is_not_missed(name: str) -> None:
    """In every family and one by one, modulated and joint sublayers among them."""
    of_family = family(name)
    program, _ = run_passes(of_family.program, [Canonicalize(allow_no_match=True)])
    regions = [r for r in program.regions(Summand) if r.objection is None]
    assert len(regions) == len(program.regions(Summand))
    for region in regions[:3]:
        new = dropped(program, region.label, parts=("attention", "feed_forward", "branch"))

        def without(*inputs: Tensor, region: Summand = region) -> tuple[Tensor, ...]:
            given = dict(zip(region.inputs, inputs, strict=True))
            return tuple(given[other] for other in region.others)

        expected = run(program, of_family.inputs, instead=[(region, without)])
        for ours, theirs in zip(run(new, of_family.inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert new.cost().parameters < program.cost().parameters


def test_what_turns_its_stream_least_goes_first(gpt: GPT, tokens: Tensor) -> None:
    program = bw.capture(gpt, (tokens,))
    small = {"blocks.1.down.weight", "blocks.1.down.bias"}
    tensors = {n: t * 1e-3 if n in small else t for n, t in program.tensors.items()}
    quiet = program.with_(tensors=tensors)
    _, (step,) = run_passes(quiet, [DropSublayers(keep_ratio=5 / 6)], [[tokens]])
    ((label, decision),) = step.plan.decisions.items()
    assert label == "blocks.1.up_down.residual"
    assert 0 <= decision.influence < 1e-4


def test_random_ones_are_the_same_again(program: Program) -> None:
    picks = [
        tuple(DropSublayers(importance="random", keep_ratio=0.5, seed=s).plan(program).decisions)
        for s in (0, 0, 1)
    ]
    assert picks[0] == picks[1] != picks[2]
    assert len(picks[0]) == 3


class Joined(nn.Module):
    """Attention and feed-forward network are added up before they meet the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (2, 2)).transpose(1, 2) for layer in self.qkv)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + (y + self.down(F.gelu(self.up(h))))


def test_what_joins_the_stream_together_goes_one_at_a_time() -> None:
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(2, 3, 4)
    program = bw.capture(model, (x,))
    ffn, attention = sorted(program.regions(Summand), key=lambda r: r.sublayer.region.kind)[::-1]
    new, _ = run_passes(program, [DropSublayers(sublayers=(ffn.label,))])
    expected = model(x) - model.down(F.gelu(model.up(model.norm(x))))
    torch.testing.assert_close(run(new, [x])[0], expected)
    both = DropSublayers(sublayers=("*",)).plan(program)
    assert len(both.decisions) == 1
    assert "joins its stream together with one that is dropped" in both.skips.values()
    assert attention.label != ffn.label


def test_declines(program: Program) -> None:
    def refused(reason: str, **options: object) -> None:
        with pytest.raises(NoMatchError, match=reason):
            run_passes(program, [DropSublayers(importance="random", **options)])

    refused("is excluded by pattern", exclude=("*",))
    refused("is of another kind: attention", parts=("branch",))
    refused("is kept: others matter less", keep_ratio=1.0)


def test_refuses_to_leave_nothing_and_bad_options(program: Program) -> None:
    with pytest.raises(OptionError, match="would drop all 6 sublayers of the model"):
        dropped(program, "*")
    with pytest.raises(OptionError, match="influence is measured on calibration inputs"):
        DropSublayers().plan(program)
    for options, reason in (
        ({"keep_ratio": 0.0}, "keep_ratio=0.0 is no fraction of sublayers"),
        ({"importance": "luck"}, "importance=luck is not supported"),
        ({"parts": ("head",)}, "parts=head is not supported"),
    ):
        with pytest.raises(OptionError, match=reason):
            DropSublayers(**options)


@pytest.mark.parametrize(("name", "parameters"), [("attention", 2_362_368), ("up_down", 4_722_432)])
def test_a_sublayer_of_bert_base_has_as_many_parameters_as_the_paper_says(
    name: str, parameters: int
) -> None:
    with torch.device("meta"):
        model = bert.Bert(replace(bert.BERT_BASE, depth=2)).eval()
        program = bw.capture(model, model.example_inputs())
    new = dropped(program, f"blocks.1.{name}*")
    assert program.cost().parameters - new.cost().parameters == parameters
