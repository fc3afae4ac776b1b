"""HashLinear: what becomes tables, how they begin, where they are the dense layers, engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize.readers import Readers
from blockwright.ir.run import run
from blockwright.kernels.hashing import SCORES, chunks, hashed
from blockwright.models import bert, dit, flux, llama, vit
from blockwright.models.gpt import GPT
from blockwright.passes import DropBlocks, FuseProjections, HashLinear, QuantizeWeights
from blockwright.passes.shared.tables import (
    RowSums,
    sign_prototypes,
    sign_vectors,
    tables_of,
)

ATTENTION: dict[str, Any] = {"parts": ("attention",), "remove_out_proj": False}


class Signs(nn.Module):
    """An attention over what it is given, without a norm."""

    def __init__(self, dim: int = 12, *, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture
def signs() -> tuple[Program, list[Tensor]]:
    """The attention, and inputs of one size."""
    torch.manual_seed(0)
    x = 0.7 * torch.randint(0, 2, (2, 5, 12)).mul(2).sub(1).float()
    return bw.capture(Signs().eval(), (x,)), [x]


def calls(program: Program) -> list[str]:
    nodes = (node for graph in program.graphs.values() for node in graph.nodes)
    return [str(n.target) for n in nodes if "blockwright" in str(n.target)]


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [HashLinear(tau=2)], [[tokens]])
    golden("hash_linear", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("init", ["conditional_mean", "least_squares"])
@pytest.mark.parametrize("share", [True, False])
def test_on_inputs_of_one_size_it_is_the_dense_layer(
    signs: tuple[Program, list[Tensor]], score: str, init: str, share: bool
) -> None:
    program, inputs = signs
    method = HashLinear(tau=4, score=score, init=init, share_qkv_hash=share, **ATTENTION)
    new, (step,) = run_passes(program, [method], [inputs])
    assert list(step.plan.decisions.values()) == ["tables"]
    torch.testing.assert_close(run(new, inputs), run(program, inputs), atol=1e-5, rtol=1e-5)


def test_one_hash_serves_queries_keys_and_values(signs: tuple[Program, list[Tensor]]) -> None:
    program, inputs = signs
    found = {}
    for share in (True, False):
        method = HashLinear(tau=3, init="least_squares", share_qkv_hash=share, **ATTENTION)
        found[share], _ = run_passes(program, [method], [inputs])
        assert len(calls(found[share])) == (1 if share else 3)
    x = [torch.randn(2, 5, 12)]
    torch.testing.assert_close(run(found[True], x), run(found[False], x))
    hashing = [found[share].cost().by_kind["elementwise"] for share in (True, False)]
    assert hashing[1] - hashing[0] == 2 * 3 * x[0].numel()


def test_a_network_becomes_two_lookups_with_a_norm_between(program: Program) -> None:
    for mode, tables in (
        ("extra_bit", [(4, 4, 16), (4, 16, 8)]),
        ("extra_table", [(4, 4, 16), (8, 4, 8)]),
        ("single", [(4, 4, 8)]),
    ):
        method = HashLinear(tau=2, ffn_mode=mode, parts=("feed_forward",))
        new, _ = run_passes(program, [method])
        first = new.instances["blocks.0"].weights.values()
        shapes = [tuple(new.tensors[n].shape) for n in first if n.endswith("tables")]
        assert shapes == tables
        norms = len(new.norms()) - len(program.norms())
        assert norms == (0 if mode == "single" else 3)
        assert not new.feed_forwards()


def test_the_layer_behind_an_attention_goes_where_heads_fit_the_stream(program: Program) -> None:
    new, (step,) = run_passes(program, [HashLinear(tau=2, parts=("attention",))])
    assert step.plan.decisions["blocks.0.attention.out"] == "nothing"
    assert [attention.output for attention in new.attentions()] == [None] * 3
    model = llama.Llama(llama.LlamaConfig(**WIDE_HEADS)).eval()
    wide = bw.capture(model, model.example_inputs())
    _, (step,) = run_passes(wide, [HashLinear(tau=2, parts=("attention",))])
    reason = step.plan.skips["blocks.0.attention.out"]
    assert reason == "makes 8 features of 16, so nothing else fits there"


WIDE_HEADS: dict[str, Any] = {
    "vocab": 32, "dim": 8, "heads": 4, "kv_heads": 2, "head_dim": 4, "depth": 1, "ffn_dim": 12
}  # fmt: skip


def test_the_layer_behind_an_attention_stays_where_what_is_before_it_does(
    program: Program,
) -> None:
    method = HashLinear(tau=3, ffn_mode="single", allow_no_match=True)
    _, (step,) = run_passes(program, [method])
    assert not step.receipt.changed
    reason = step.plan.skips["blocks.0.attention.out"]
    assert reason == "stays: not all that makes queries, keys and values is hashed"
    only = HashLinear(tau=2, include=("*.attention.out", "blocks.1.*"))
    _, (step,) = run_passes(program, [only])
    gone = [name for name, d in step.plan.decisions.items() if d == "nothing"]
    assert gone == ["blocks.1.attention.out"]


def test_chunks_stand_for_their_own_features() -> None:
    torch.manual_seed(0)
    weight, z = torch.randn(5, 6), sign_vectors(3).float()
    tables = tables_of(weight, sign_prototypes(3, "l1_softmax", 1.0).expand(2, -1, -1))
    for code, vector in enumerate(z):
        for place in range(2):
            x = torch.zeros(1, 6)
            x[0, 3 * place : 3 * place + 3] = vector
            found, score = hashed(x, 3, "l1_softmax")
            assert int(found[0, place]) == code
            y = score[0, place] * tables[place, code]
            torch.testing.assert_close(y, (x @ weight.T)[0])


def fitted(kind: str, x: Tensor, tau: int, weight: Tensor, score: str = "l1_softmax") -> Tensor:
    sums = RowSums(weight.shape[1] // tau, tau, score, kind)
    for part in x.split(100):
        sums.add(part)
    return tables_of(weight, sums.prototypes())


def error(tables: Tensor, x: Tensor, weight: Tensor, score: str = "l1_softmax") -> float:
    y = torch.ops.blockwright.hash_linear(x, tables, None, score)
    return float((y - x @ weight.T).norm() / (x @ weight.T).norm())


def test_rows_are_fitted_as_the_formulas_say() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(500, 4), torch.randn(3, 4)
    z, (code, score) = chunks(x, 2)[:, 1], hashed(x, 2, "softmax")
    own = code[:, 1] == 2
    z, s = z[own], score[own, 1, None]
    mean = z.mean(0) / s.mean()
    best = (s * z).sum(0) / s.square().sum()
    for kind, prototype in (("conditional_mean", mean), ("least_squares", best)):
        tables = fitted(kind, x, 2, weight, "softmax")
        torch.testing.assert_close(tables[1, 2], weight[:, 2:] @ prototype)


def test_rows_nobody_addressed_begin_with_signs() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(50, 4) + 0.1, torch.randn(3, 4)  # all signs are positive
    tables = fitted("least_squares", x, 2, weight)
    prototypes = sign_prototypes(2, "l1_softmax", float(x.abs().mean()))
    signs = tables_of(weight, prototypes.expand(2, -1, -1))
    torch.testing.assert_close(tables[:, :3], signs[:, :3])
    assert not torch.allclose(tables[:, 3], signs[:, 3])


def test_fitted_tables_are_better_the_fewer_elements_share_a_score() -> None:
    torch.manual_seed(0)
    x, held, weight = torch.randn(4000, 8), torch.randn(500, 8), torch.randn(6, 8)
    errors = [error(fitted("least_squares", x, tau, weight), held, weight) for tau in (1, 2, 4, 8)]
    assert errors == sorted(errors)
    assert errors[0] < 0.3
    assert errors[-1] < 0.8
    drawn = 0.02 * torch.randn(1, 256, 6)
    assert error(drawn, held, weight) > 0.95


def test_training_moves_tables_and_nothing_else(program: Program, tokens: Tensor) -> None:
    batches = [[torch.randint(0, 32, (2, 8))] for _ in range(4)]
    method = HashLinear(tau=2, epochs=10, init="least_squares")
    new, (step,) = run_passes(program, [method], [[tokens]], calibration=batches)
    (training,) = step.receipt.trained
    assert training.kept
    assert training.after < 0.7 * training.before
    for name in new.tensors.keys() & program.tensors.keys():
        assert torch.equal(new.tensors[name], program.tensors[name])


@pytest.mark.parametrize(
    "kind", ["dit", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bert", "vit", "flux"))]
)
def test_every_family_converts(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "bert": lambda: bert.Bert(bert.TOY), "vit": lambda: vit.ViT(vit.TOY),
        "dit": lambda: dit.DiT(dit.TOY), "flux": lambda: flux.Flux(flux.TOY_FLUX),
    }[kind]()  # fmt: skip
    program = bw.capture(model.eval(), model.example_inputs())
    inputs = list(model.example_inputs())
    new, (step,) = run_passes(program, [HashLinear(tau=2)], [inputs])
    assert step.receipt.changed
    assert new.explain().inside() == (1.0, 1.0)
    assert not any(y.isnan().any() for y in run(new, inputs))


def test_the_whole_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = llama.Llama(llama.TOY).eval()
        x = torch.zeros(2, 8, dtype=torch.int64)
    new, (step,) = run_passes(bw.capture(model, (x,)), [HashLinear(tau=4)])
    assert new.cost().parameters > 0
    assert len(step.receipt.changed) == 6


def test_tokens_do_not_see_each_other(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [HashLinear(tau=4)])
    together = run(new, [tokens])[0]
    for row in range(2):
        torch.testing.assert_close(run(new, [tokens[row : row + 1]])[0][0], together[row])


def test_it_follows_and_precedes_others(program: Program, tokens: Tensor) -> None:
    for recipe in (
        [DropBlocks(keep_ratio=0.67, importance="random"), HashLinear(tau=2)],
        [FuseProjections(), HashLinear(tau=2)],
        [HashLinear(tau=2, parts=("attention",)), QuantizeWeights()],
    ):
        new, steps = run_passes(program, recipe, [[tokens]])
        assert all(step.receipt.changed for step in steps)
        assert run(new, [tokens])[0].isfinite().all()
    with pytest.raises(OptionError, match="packs the weights"):
        run_passes(program, [QuantizeWeights(), HashLinear(tau=2)])


def skips(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> list[str]:
    program = bw.capture(model.eval(), inputs)
    _, (step,) = run_passes(program, [HashLinear(allow_no_match=True, **options)])
    return list(step.plan.skips.values())


class Activated(nn.Module):
    """A layer behind an activation, in no sublayer; and one that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twin = (nn.Linear(8, 8) for _ in range(3))
        self.twin.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.second(F.relu(self.first(x))))


def test_declines(program: Program) -> None:
    with pytest.raises(NoMatchError, match="reads 8 features, which chunks of tau=3 do not divide"):
        run_passes(program, [HashLinear(tau=3, **ATTENTION)])
    with pytest.raises(NoMatchError, match="is excluded by pattern"):
        run_passes(program, [HashLinear(tau=2, exclude=("*",))])
    found = skips(Activated(), (torch.randn(2, 8),), tau=2, parts=("other",))
    assert found == [
        "shares a weight with another place",
        "reads what an activation has left, whose signs say little",
        "shares a weight with another place",
    ]
    found = skips(Activated(), (torch.randn(2, 8),), tau=2)
    assert found == ["is of a part that stays: other"] * 3


def test_weights_that_are_no_numbers_are_named(signs: tuple[Program, list[Tensor]]) -> None:
    program, inputs = signs
    broken = program.tensors["key.weight"].clone()
    broken[3, 2] = torch.nan
    program = program.with_(tensors={**program.tensors, "key.weight": broken})
    with pytest.raises(OptionError, match=r"the weight 'key.weight' holds NaN or infinity"):
        run_passes(program, [HashLinear(tau=4, init="least_squares", **ATTENTION)], [inputs])
    run_passes(program, [HashLinear(tau=4, **ATTENTION)])  # at random it does not matter


def test_beginnings_need_inputs(signs: tuple[Program, list[Tensor]]) -> None:
    program, (x,) = signs
    method = HashLinear(tau=4, init="conditional_mean", **ATTENTION)
    with pytest.raises(OptionError, match="fitted to calibration inputs, and there are none"):
        run_passes(program, [method], calibration=[])
    with pytest.raises(OptionError, match=r"what .* reads is NaN or infinite"):
        run_passes(program, [method], calibration=[[x * torch.inf]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0}, "tau=0 is out of range; use 1 to 16"),
        ({"tau": 17}, "tau=17 is out of range"),
        ({"tau": 15}, "extra_bits=2 is out of range; use 0 to 1"),
        ({"score": "cosine"}, "score=cosine is not supported; use one of l1_softmax, softmax"),
        ({"ffn_mode": "deep"}, "ffn_mode=deep is not supported"),
        ({"init": "zeros"}, "init=zeros is not supported"),
        ({"parts": ("head",)}, "parts=head is not supported"),
        ({"epochs": 0}, "epochs=0 is out of range"),
        ({"rate": 0.0}, "rate=0.0 is out of range"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HashLinear(**options)


def test_layers_of_one_value_and_role_are_found_together(program: Program) -> None:
    found = program.regions(Readers)
    assert [(r.label, r.role, len(r.members)) for r in found[:2]] == [
        ("blocks.0.attention", "attention", 3),
        ("blocks.0.attention.out", "output", 1),
    ]
    assert len(found) == 7  # two in each of three blocks, and the head


@pytest.mark.parametrize(
    "backend",
    ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(600)
def test_engines_compute_it(backend: str, gpt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    engine = bw.compile(gpt, [HashLinear(tau=2)], (tokens,), backend=backend)
    new = engine.program
    torch.testing.assert_close(engine(tokens), run(new, [tokens])[0], atol=1e-5, rtol=1e-4)
    engine.save(tmp_path / "hashed.bw")
    again = bw.load(tmp_path / "hashed.bw", trust=True)
    assert torch.equal(again(tokens), engine(tokens))
