"""Heads and neurons with all that belongs to them: narrow regions compute what masked ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention, Coupled, FeedForward, coupled_heads, coupled_neurons
from blockwright.ir.recognize.units import Mixed, regrouped
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run, run_on, run_until
from blockwright.ir.verify import verify
from blockwright.models import llama, qwen_image
from blockwright.passes import Canonicalize
from blockwright.testing.families import FAMILIES, family

HALVES = {
    "heads": lambda p: [coupled_heads(a) for a in p.attentions()],
    "queries": lambda p: [coupled_heads(a, queries=True) for a in p.attentions()],
    "neurons": lambda p: [coupled_neurons(f) for f in p.feed_forwards()],
}


def half(coupled: Coupled) -> list[int]:
    """Every second unit of each group."""
    size = coupled.count // coupled.groups
    return [unit for unit in range(coupled.count) if unit % size % 2 == 0]


def narrow_and_masked(program: Program, found: list[Coupled]) -> tuple[Program, list]:
    able = [c for c in found if c.objection is None]
    new = rewrite(program, [(c.region, c.keep(half(c))) for c in able], by="test")
    verify(new, by="test")
    return new, [(c.region, c.mask(half(c))) for c in able]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_regions_compute_what_masked_ones_do(name: str, kind: str) -> None:
    of_family = family(name)
    program, _ = run_passes(of_family.program, [Canonicalize(allow_no_match=True)])
    found = HALVES[kind](program)
    new, masked = narrow_and_masked(program, found)
    if name != "swin" or kind == "neurons":
        assert len(masked) == len(found)
        assert new.cost().parameters < program.cost().parameters
    expected = run(program, of_family.inputs, instead=masked)
    for ours, theirs in zip(run(new, of_family.inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    whole = [(c.region, c.mask(range(c.count))) for c in found if c.objection is None]
    for ours, theirs in zip(
        run(program, of_family.inputs, instead=whole), run(program, of_family.inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("by", ["heads", "queries"])
def test_norms_of_single_heads_go_with_them(by: str) -> None:
    torch.manual_seed(0)
    config = replace(llama.TOY, depth=1, qk_norm=True)
    program = capture(llama.Llama(config).eval(), (torch.arange(8)[None],))
    new, masked = narrow_and_masked(program, HALVES[by](program))
    (attention,) = new.attentions()
    assert (attention.heads, attention.kv_heads) == ((2, 1) if by == "heads" else (2, 2))
    inputs = [torch.arange(8)[None]]
    torch.testing.assert_close(run(new, inputs), run(program, inputs, instead=masked))


def test_both_streams_of_a_joint_attention_lose_the_same_heads() -> None:
    torch.manual_seed(0)
    model = qwen_image.QwenImage(qwen_image.TOY).eval()
    inputs = model.example_inputs()
    program = capture(model, inputs)
    new, _ = narrow_and_masked(program, HALVES["heads"](program))
    assert all(a.heads == 1 and len(a.streams) == 2 for a in new.attentions())


def attention_of(model: nn.Module, x: Tensor) -> Attention:
    return capture(model.eval(), (x,)).attentions()[0]


class Heads(nn.Module):
    """An attention of four heads on a stream, with something odd about it."""

    def __init__(self, odd: Callable[[Tensor], Tensor] | str = "") -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.out, self.odd = nn.Linear(8, 8), odd
        self.norm = nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        if odd == "tied":
            self.qkv[1].weight = self.qkv[0].weight

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.qkv)
        if self.odd == "norm":
            q = self.norm(q)
        q, k, v = (y.unflatten(-1, (4, 2)).transpose(1, 2) for y in (q, k, v))
        mask = (self.bias * x.sum()) if self.odd == "mask" else None
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)
        result = x + self.out(y)
        return result + y if self.odd == "read" else result


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("norm", "is normalised over all its units together"),
        ("tied", "shares the weight .* with another place"),
        ("mask", "is made outside of it and does not shrink"),
        ("read", "has units that are read outside of it"),
    ],
)
def test_what_is_coupled_outside_is_refused(odd: str, reason: str) -> None:
    coupled = coupled_heads(attention_of(Heads(odd), torch.randn(2, 3, 8)))
    assert coupled.objection is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(coupled.objection)


def test_groups_must_keep_as_many_heads_each() -> None:
    program = family("llama").program
    coupled = coupled_heads(program.attentions()[0], queries=True)
    assert coupled.groups == 2
    for units in ([0, 1], [], [0, 4]):
        with pytest.raises(OptionError, match=r"cannot be what is kept of 4") as caught:
            coupled.keep(units)
        assert "as many of each 2" in str(caught.value)


class Convolved(nn.Module):
    """A network over channels with a depthwise convolution among its neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.mix = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.mix(self.up(x))))


def test_kernels_go_with_their_neurons() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    program = capture(Convolved().eval(), (x,))
    new, masked = narrow_and_masked(program, HALVES["neurons"](program))
    assert new.tensors["mix.weight"].shape == (3, 1, 3, 3)
    torch.testing.assert_close(run(new, [x]), run(program, [x], instead=masked))


class FusedGate(nn.Module):
    """A gated network whose gate and up are halves of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(4, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def test_halves_of_a_fused_layer_lose_the_same_neurons() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    program = capture(FusedGate().eval(), (x,))
    (ffn,) = program.feed_forwards()
    new = rewrite(program, [(ffn, coupled_neurons(ffn).keep([1, 4]))], by="test")
    old = program.tensors["both.weight"]
    assert torch.equal(new.tensors["both.weight"], old[[1, 4, 7, 10]])
    assert isinstance(new.feed_forwards()[0], FeedForward)
    assert new.feed_forwards()[0].ffn_dim == 2


def test_views_that_merge_units_with_others_are_refused() -> None:
    assert regrouped(((0, 0, 1, 1), None), (4, 3), (2, 2, 3)) == ((0, 1), None, None)
    assert regrouped((None, (0, 1)), (2, 2), (4,)) == ((0, 1, 0, 1),)
    batch = sympy.Symbol("batch")
    with pytest.raises(Mixed, match="with an axis of unknown size"):
        regrouped((None, (0, 1)), (batch, 2), (batch * 2,))
    with pytest.raises(Mixed, match="in no regular order"):
        regrouped(((0, 0, 1, 1, 2, 2),), (6,), (2, 3))


def test_a_run_goes_on_from_where_it_stopped(program: Program, tokens: Tensor) -> None:
    whole = run(program, [tokens])
    for call in list(program.calls())[1:]:
        paused = run_until(program, [tokens], call)
        for _ in range(2):
            assert torch.equal(run_on(program, paused)[0], whole[0])
