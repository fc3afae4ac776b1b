"""What MemoryFormer claims: its invariants and costs in full, its learning on a toy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.account import Meter
from blockwright.driver.manager import run_passes
from blockwright.ir.ops.hashing import hashed, rows_of
from blockwright.ir.program import Program
from blockwright.ir.recognize import Place
from blockwright.ir.run import run
from blockwright.ir.taps import tapped
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.models.memoryformer import MemoryFormer, MemoryFormerConfig
from blockwright.passes import HashLinear
from blockwright.passes.shared.tables import RowSums, sign_prototypes, tables_of
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import data, deep_gpt, training
from blockwright.testing.toys.language import next_characters
from blockwright.testing.toys.scores import bits_per_character

pytestmark = pytest.mark.acceptance
METHOD = "memoryformer"
SEQ = 2048
LOOK_UP = torch.ops.blockwright.hash_linear


def test_invariants_of_the_layer(acceptance: Acceptance) -> None:
    torch.manual_seed(0)
    x, tables = torch.randn(64, 16), torch.randn(4, 16, 12, requires_grad=True)
    code, weight = hashed(x, 4, "l1_softmax")
    y = LOOK_UP(x, tables, None, "l1_softmax")
    bag = nn.functional.embedding_bag(
        rows_of(code, 4), tables.flatten(0, 1), mode="sum", per_sample_weights=weight
    )
    apart = float((y - bag).detach().abs().max())
    acceptance(
        METHOD, 1, "The layer is an embedding bag over the rows that signs address.",
        naive="PyTorch's embedding_bag", figure=f"{apart:.1e} apart", holds=apart < 1e-5,
    )  # fmt: skip
    signs = 0.7 * torch.randint(0, 2, (64, 16)).mul(2).sub(1).float()
    dense = torch.randn(12, 16)
    prototypes = sign_prototypes(4, "l1_softmax", 0.7).expand(4, -1, -1)
    exact = tables_of(dense, prototypes)
    error = float((LOOK_UP(signs, exact, None, "l1_softmax") - signs @ dense.T).abs().max())
    acceptance(
        METHOD, 1, "On inputs of one size the tables of a dense layer are that layer.",
        naive="the dense layer", figure=f"{error:.1e} apart", holds=error < 1e-5,
    )  # fmt: skip
    y.sum().backward()
    assert tables.grad is not None
    addressed = torch.zeros(4, 16, dtype=torch.bool)
    addressed[torch.arange(4).expand_as(code), code] = True
    sparse = torch.equal(tables.grad.abs().sum(-1) > 0, addressed)
    acceptance(
        METHOD, 1, "Only rows that are addressed get gradients.",
        naive="none", figure=f"{int(addressed.sum())} of {addressed.numel()} rows", holds=sparse,
    )  # fmt: skip
    assert apart < 1e-5
    assert error < 1e-5
    assert sparse


# Multiply-adds of a block at 2,048 tokens, dense and MemoryFormer, in 10^9.
PUBLISHED = [
    (512, 10.737, 4.647),
    pytest.param(768, 20.938, 7.235, marks=pytest.mark.slow),
    pytest.param(1024, 34.360, 9.999, marks=pytest.mark.slow),
]


def block_products(program: Program, vocab: int, dim: int) -> float:
    """Return the multiply-adds of all blocks, those of the head left out, in 10^9."""
    kinds = program.cost().by_kind
    return (kinds["linear"] + kinds["attention"]) / 2e9 - SEQ * dim * vocab / 1e9


@pytest.mark.parametrize(("dim", "dense", "memory"), PUBLISHED)
def test_cost_of_a_block(dim: int, dense: float, memory: float, acceptance: Acceptance) -> None:
    vocab, heads = 32, 8
    tokens = torch.zeros(1, SEQ, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        sizes = GPTConfig(vocab, context=SEQ, dim=dim, heads=heads, depth=1, ffn_dim=4 * dim)
        model = MemoryFormer(MemoryFormerConfig(vocab=vocab, dim=dim, heads=heads, depth=1))
        old, new = (bw.capture(m.eval(), (tokens,)) for m in (GPT(sizes), model))
    converted, _ = run_passes(old, [HashLinear()])
    before, after, other = (block_products(p, vocab, dim) for p in (old, new, converted))
    holds = [before, after] == pytest.approx([dense, memory], abs=1e-3)
    acceptance(
        METHOD, 3, f"At width {dim} and 2,048 tokens a block takes {memory / dense:.1%} of the"
        " products.",
        naive=f"the dense block, {dense:.1f} GMAC", figure=f"{after:.3f} of {before:.3f} GMAC",
        holds=holds,
    )  # fmt: skip
    closed = (2 * SEQ**2 * dim + SEQ * dim**2 * (3 / 8 + 10 / 64 + 1 / 8)) / 1e9
    assert [after, other] == pytest.approx([closed, closed])
    assert holds
    stored = [p.numel() for n, p in model.named_parameters() if n.endswith("tables")]
    assert sum(stored) == 22 * 12 * dim**2


def test_the_saving_grows_with_the_width(acceptance: Acceptance) -> None:
    whole, hashed_ = (2 * SEQ + share * 2048 for share in (12, 0.65625))
    holds = hashed_ / whole == pytest.approx(0.19, abs=5e-4)
    acceptance(
        METHOD, 3, "At width 2,048 a block takes 19 % of the products.",
        naive="the dense block, closed form", figure=f"{hashed_ / whole:.1%}", holds=holds,
    )  # fmt: skip
    assert holds


def test_what_runs_is_what_is_predicted(acceptance: Acceptance) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=32, context=16, dim=16, heads=2, depth=2, ffn_dim=64)).eval()
    program = bw.capture(model, model.example_inputs())
    new, _ = run_passes(program, [HashLinear(tau=4)])
    meter = Meter(new)
    run(new, list(model.example_inputs()), on_node=meter.saw)
    found, cost = meter.counts(), new.cost()
    holds = (found["flops"], found["parameters"]) == (cost.flops, cost.parameters)
    acceptance(
        METHOD, 3, "FLOPs and tables counted in a run are those of the closed form.",
        naive="none", figure=f"{found['flops']:,} FLOPs, {found['parameters']:,} weights",
        holds=holds,
    )  # fmt: skip
    assert holds


class Copies(nn.Module):
    """Queries, keys and values that are the value itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x, x), dim=-1)


class Nothing(nn.Module):
    """A feed-forward network that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


SIZES = MemoryFormerConfig(vocab=data.VOCAB, context=128, dim=64, heads=4, depth=3)
PLAN = training.Plan(steps=500, batch=4, rate=3e-3)


def memory() -> MemoryFormer:
    return MemoryFormer(SIZES)


def dense() -> MemoryFormer:
    """The same model with a matrix in the place of each layer, and a GELU."""
    model, dim = memory(), SIZES.dim
    for block in model.blocks:
        block.attention.qkv = nn.Linear(dim, 3 * dim)
        block.first = nn.Linear(dim, 4 * dim)
        block.middle_norm, block.second = nn.GELU(), nn.Linear(4 * dim, dim)
    return model


def bare() -> MemoryFormer:
    """The same model without projections: attention over the stream, and no network."""
    model = memory()
    for block in model.blocks:
        block.attention.qkv = Copies()
        block.first, block.middle_norm, block.second = nn.Identity(), nn.Identity(), Nothing()
    return model


def learned(build: Callable[[], MemoryFormer]) -> float:
    """Return the bits per character of a model trained from scratch."""
    text = data.text()
    loss = training.task_loss(next_characters(text.train), PLAN.batch)
    model = training.train(build, loss, PLAN, build.__name__)
    held = data.windows(text.validation, SIZES.context + 1, 64)
    return bits_per_character(model, held, 8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_trained_from_scratch(acceptance: Acceptance) -> None:
    bits = {build.__name__: learned(build) for build in (dense, memory, bare)}
    figure = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    acceptance(
        METHOD, 2, f"After {PLAN.steps} equal steps it is better than without projections.",
        naive="attention over the stream itself, no network", holds=bits["memory"] < bits["bare"],
        figure=f"{figure} bits per character",
    )  # fmt: skip
    gap = bits["memory"] - bits["dense"]
    acceptance(
        METHOD, 2, "It is as good as dense (published at scale, not for toys).",
        naive="a matrix for every table", holds=gap <= 0,
        figure=f"{gap:+.3f} bits per character",
    )  # fmt: skip
    assert bits["memory"] < bits["bare"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tables_of_a_dense_layer(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    ffn = program.feed_forwards()[4]
    taps = tapped(program, [Place(ffn.instance, ffn.x)])
    with torch.no_grad():
        seen = torch.cat([taps(*inputs)[0].flatten(0, 1) for inputs in toy.calibration(24)])
    x, held = seen.tensor_split([len(seen) * 9 // 10])
    errors = {tau: lost(x, held, ffn.up, tau) for tau in (1, 2, 4, 8)}
    drawn = distance(0.02 * torch.randn(8, 256, len(ffn.up)), held, ffn.up)
    listed = " / ".join(f"{error:.3f}" for error in errors.values())
    growing = sorted(errors.values()) == list(errors.values())
    acceptance(
        METHOD, 4, "Rows fitted to a trained layer lose more the more elements share a score,"
        " tau = 1 / 2 / 4 / 8.",
        naive="tau=1", figure=f"{listed} of the output", holds=growing and errors[1] < 0.1,
    )  # fmt: skip
    acceptance(
        METHOD, 4, "They lose far less than tables at random, on inputs they have not seen.",
        naive="tables at random", figure=f"{errors[8]:.3f} against {drawn:.3f} at tau=8",
        holds=errors[8] < 0.7 * drawn,
    )  # fmt: skip
    assert growing
    assert errors[8] < drawn


def lost(x: Tensor, held: Tensor, weight: Tensor, tau: int) -> float:
    """Return the error of tables fitted on x, relative to the output on other inputs."""
    sums = RowSums(weight.shape[1] // tau, tau, "l1_softmax", "least_squares")
    sums.add(x)
    return distance(tables_of(weight, sums.prototypes()), held, weight)


def distance(tables: Tensor, x: Tensor, weight: Tensor) -> float:
    y, expected = LOOK_UP(x, tables, None, "l1_softmax"), x @ weight.T
    return float((y - expected).norm() / expected.norm())
