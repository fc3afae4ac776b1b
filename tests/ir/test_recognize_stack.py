"""Stacks, structures, and what lies around blocks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.flatten import flatten
from blockwright.ir.program import Program
from blockwright.ir.recognize import block_classes
from blockwright.passes.canonicalize import Canonicalize
from blockwright.testing.snapshot import scrambled

OURS = {
    "gpt": "gpt.GPT.TOY",
    "llama": "llama.Llama.TOY",
    "bert": "bert.Bert.TOY",
    "vit": "vit.ViT.TOY",
    "swin": "swin.Swin.TOY",
    "dit": "dit.DiT.TOY",
    "flux": "flux.Flux.TOY_FLUX",
    "sd3": "sd3.SD3.TOY_SD3",
}


@pytest.fixture(scope="module")
def ours() -> Callable[[str], Program]:
    """Capture one of our models, once."""

    @cache
    def get(name: str) -> Program:
        file, model, config = OURS[name].split(".")
        module = importlib.import_module(f"blockwright.models.{file}")
        torch.manual_seed(0)
        return capture(getattr(module, model)(getattr(module, config)).eval())

    return get


@pytest.mark.parametrize(
    ("name", "lengths", "periods"),
    [
        ("gpt", [3], [1]),
        ("bert", [3], [1]),
        ("swin", [2, 4], [2, 2]),
        ("dit", [3], [1]),
        ("flux", [3, 3], [1, 1]),
        ("sd3", [4], [1]),
    ],
)
def test_stacks(
    ours: Callable[[str], Program], name: str, lengths: list[int], periods: list[int]
) -> None:
    for program in (ours(name), flatten(ours(name))):
        stacks = program.stacks()
        assert [len(stack.blocks) for stack in stacks] == lengths
        assert [stack.period for stack in stacks] == periods
        assert sum(lengths) == len(program.blocks())


def test_cuts_are_the_values_between_blocks(ours: Callable[[str], Program]) -> None:
    (stack,) = ours("gpt").stacks()
    assert len(stack.cuts) == 4
    for block, before, after in zip(stack.blocks, stack.cuts, stack.cuts[1:], strict=False):
        (start,), (end,) = before, after
        assert end is not None
        assert (end.instance, end.node) == (block.instance, block.stream_out)
        assert start is not None
        assert start != end


def test_streams_that_end(ours: Callable[[str], Program]) -> None:
    (stack,) = ours("sd3").stacks()
    assert sorted(stack.ends, key=str) == [3, None]
    assert [end is None for end in stack.cuts[-1]] == [end == 3 for end in stack.ends]


def test_costs_of_blocks_add_up(ours: Callable[[str], Program]) -> None:
    program = ours("gpt")
    (stack,) = program.stacks()
    costs = stack.costs()
    assert len(set(costs)) == 1
    shares = {s.owner: s for s in program.explain().shares}
    owners = ("attention", "feed_forward", "norm", "block")
    assert sum(cost.flops for cost in costs) <= sum(shares[owner].flops for owner in owners)
    assert costs[0].parameters == 532


@pytest.mark.parametrize("name", OURS)
def test_everything_has_an_owner(ours: Callable[[str], Program], name: str) -> None:
    explanation, cost = ours(name).explain(), ours(name).cost()
    assert (explanation.parameters, explanation.flops) == (cost.parameters, cost.flops)
    assert min(explanation.inside()) == 1.0
    shares = {s.owner: s for s in explanation.shares}
    assert shares["head"].regions == len(ours(name).heads()) == 1
    between = shares.get("transition")
    assert (between.parameters if between else 0) == (128 if name == "swin" else 0)


def test_single_blocks_are_ordinary_parallel_ones_after_canonicalizing(
    ours: Callable[[str], Program],
) -> None:
    _, before = ours("flux").stacks()
    program, _ = run_passes(ours("flux"), [Canonicalize()])
    _, after = program.stacks()
    assert {block.shares_output for block in before.blocks} == {True}
    assert {block.shares_output for block in after.blocks} == {False}
    for block in after.blocks:
        assert block.is_parallel
        assert sorted(s.region.kind for s in block.sublayers) == ["attention", "feed_forward"]
        assert [s.output.columns for a in block.attentions for s in a.streams if s.output] == [None]
    assert min(program.explain().inside()) == 1.0


@pytest.mark.parametrize(
    ("name", "form"),
    [("gpt", "linear"), ("bert", "pooled"), ("vit", "pooled"), ("swin", "pooled"),
     ("dit", "modulated"), ("flux", "modulated"), ("sd3", "modulated")],
)  # fmt: skip
def test_heads(ours: Callable[[str], Program], name: str, form: str) -> None:
    (head,) = ours(name).heads()
    assert head.form == form
    assert head.is_tied == (name == "gpt")
    assert len(head.layers) == 1


@pytest.mark.parametrize(
    ("name", "forms"),
    [("gpt", ["table"]), ("vit", ["patch"]), ("dit", ["patch"]), ("flux", ["linear", "linear"]),
     ("sd3", ["linear", "patch"])],
)  # fmt: skip
def test_stems(ours: Callable[[str], Program], name: str, forms: list[str]) -> None:
    stems = ours(name).stems()
    assert sorted(stem.form for stem in stems) == forms
    assert sum(len(stem.tables) for stem in stems) == len(ours(name).embeddings()) - (name == "dit")
    if name == "vit":
        assert sorted(str(node) for node in stems[0].stored)  # class token and positions


@pytest.mark.parametrize("name", OURS)
def test_structures_do_not_depend_on_how_blocks_are_captured(
    ours: Callable[[str], Program], name: str
) -> None:
    folded, flat = ours(name), flatten(ours(name))
    assert [b.structure for b in folded.blocks()] == [b.structure for b in flat.blocks()]
    assert [c.text for c in block_classes(folded)] == [c.text for c in block_classes(flat)]


@pytest.mark.parametrize("name", OURS)
def test_names_do_not_matter(ours: Callable[[str], Program], name: str) -> None:
    program = ours(name)
    other = scrambled(program, seed=1)
    assert [b.constants() for b in other.blocks()] == [b.constants() for b in program.blocks()]
    assert other.explain().shares == program.explain().shares
    assert [(s.period, s.ends) for s in other.stacks()] == [
        (s.period, s.ends) for s in program.stacks()
    ]
    assert [h.constants() for h in other.heads()] == [h.constants() for h in program.heads()]


class Net(nn.Module):
    """One block, its numbers free."""

    def __init__(
        self, heads: int = 2, eps: float = 1e-5, act: Callable[[Tensor], Tensor] = F.relu,
        width: int = 12, swap: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.act = heads, act
        self.net = nn.ModuleDict()
        names = ["qkv", "o", "up", "down"]
        sizes = dict(zip(names, [(8, 24), (8, 8), (8, width), (width, 8)], strict=True))
        for name in reversed(names) if swap else names:
            self.net[name] = nn.Linear(*sizes[name])
        self.a, self.b = nn.LayerNorm(8, eps=eps), nn.LayerNorm(8, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.net["qkv"](self.a(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.net["o"](y)
        out: Tensor = x + self.net["down"](self.act(self.net["up"](self.b(x))))
        return out


def structure(model: nn.Module) -> str:
    (block,) = capture(model.eval(), (torch.zeros(2, 5, 8),)).blocks()
    return block.structure


def test_structures_tell_blocks_apart() -> None:
    plain = structure(Net())
    assert len(plain) == 16
    assert set(plain) <= set("0123456789abcdef")
    assert structure(Net(swap=True)) == plain
    others = [Net(heads=4), Net(eps=1e-6), Net(act=F.silu), Net(width=16)]
    assert len({plain, *map(structure, others)}) == 5


class Nameless(nn.Module):
    """A stack that no module holds, behind a feed-forward network of the same kind."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        make = lambda: nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))  # noqa: E731
        self.q, self.o, self.up, self.down = make(), make(), make(), make()
        self.norm, self.depth = nn.LayerNorm(8), depth

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down[0](F.relu(self.up[0](self.norm(x))))
        for i in range(self.depth):
            q = self.q[i](self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            x = x + self.o[i](y)
            x = x + self.down[i](F.relu(self.up[i](self.norm(x))))
        return x


def test_repeated_stretches_are_cut_at_the_borders_of_blocks() -> None:
    program = capture(Nameless().eval(), (torch.zeros(2, 5, 8),))
    assert len(program.instances) == 5
    kinds = [[s.region.kind for s in block.sublayers] for block in program.blocks()]
    assert kinds == [["feed_forward"], *[["attention", "feed_forward"]] * 5]


def test_recognition_is_done_once_per_class() -> None:
    from blockwright.models.gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=100, ffn_dim=12))
    program = capture(model.eval(), (torch.zeros(2, 8, dtype=torch.long, device="meta"),))
    (stack,) = program.stacks()
    assert len(stack.blocks) == 100
    assert stack.period == 1
    (found,) = block_classes(program)
    assert str(found) == "100 x block  pre-norm, attention 2 heads x 4 causal, ffn 12 gelu_tanh"
    assert len({block.nodes for block in stack.blocks}) == 1


class Strange(nn.Module):
    """Something between two blocks, or behind them, that no pattern fits."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.one, self.two, self.place = Net(), Net(), place
        self.mix, self.gate, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.decode = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def strange(self, x: Tensor) -> Tensor:
        scores = self.mix(x) @ self.gate(x).transpose(1, 2)
        y: Tensor = self.out(scores.sigmoid() @ x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.place == "between":
            x = self.strange(x)
        if self.place == "beside":
            x = x + self.strange(x)
        x = self.two(x)
        if self.place == "behind":
            x = self.strange(x)[:, :1]
        if self.place == "chain":
            x = x[:, 0]
            for layer in self.decode:
                x = layer(x).tanh()
        return x


@pytest.mark.parametrize(
    ("place", "nearest", "reason"),
    [
        ("between", "branch", "multiplies two activations outside of an attention"),
        ("beside", "branch", "multiplies two activations outside of an attention"),
        ("behind", "head", "multiplies two activations outside of an attention"),
        ("chain", "head", "is layer 5 in a chain, more than are understood as head"),
    ],
)
def test_what_is_strange_is_outside(place: str, nearest: str, reason: str) -> None:
    torch.manual_seed(0)
    plain = capture(Strange("").eval(), (torch.zeros(2, 5, 8),)).explain()
    strange = capture(Strange(place).eval(), (torch.zeros(2, 5, 8),)).explain()
    assert plain.inside() == (1.0, 1.0)
    assert (nearest, reason) in {(m.nearest, m.reason) for m in strange.near_misses}
    added = 6 * 72 if place == "chain" else 3 * 72
    outside = sum(s.parameters for s in strange.shares if s.owner.startswith("outside"))
    assert outside == added
    assert strange.inside()[0] == pytest.approx(1 - added / strange.parameters)
    assert strange.inside()[1] < 1


def test_attentions_and_networks_of_strange_models_are_still_found() -> None:
    program = capture(Strange("between").eval(), (torch.zeros(2, 5, 8),))
    assert len(program.attentions()) == len(program.feed_forwards()) == 2


def test_structures_do_not_depend_on_stamping() -> None:
    from blockwright.models.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=12, ffn_dim=12)).eval()
    stamped, flat = capture(model), capture(model, fold=False)
    assert len(stamped.instances) == 12
    assert not flat.instances
    assert [b.structure for b in stamped.blocks()] == [b.structure for b in flat.blocks()]
