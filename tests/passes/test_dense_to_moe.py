"""DenseToMoE: deals neurons out, routes, is exact with all experts on, goes back bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts
from blockwright.ir.run import run
from blockwright.ir.serialize import from_json, to_json
from blockwright.ir.verify import verify
from blockwright.models import dit, flux, gpt, llama
from blockwright.passes import Canonicalize, DenseToMoE, FuseProjections, QuantizeWeights
from blockwright.passes.shared.dynamic import dynamic_experts
from blockwright.passes.shared.moe import Gating, Split, routed
from blockwright.passes.shared.neurons import Network, Neurons
from blockwright.passes.shared.to_dense import to_dense

HALF: dict[str, Any] = {"shared": 0.5, "experts": 3, "importance": "magnitude"}
ALL_ON = DenseToMoE(**HALF, active=3, score="unit")
TWO_OF_THREE = DenseToMoE(**HALF, active=2)


def drawn(model: Any) -> Any:
    """The model with weights none of which is zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model.eval()


def captured(kind: str) -> tuple[Program, list[Tensor]]:
    models = {
        "llama": lambda: llama.Llama(llama.TOY),
        "dit": lambda: dit.DiT(dit.TOY),
        "flux": lambda: flux.Flux(flux.TOY_FLUX),
    }
    model = drawn(models[kind]())
    inputs = model.example_inputs(batch=2)
    program = bw.capture(model, inputs)
    canonical, _ = run_passes(program, [Canonicalize(allow_no_match=True)])
    return canonical, list(inputs)


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [TWO_OF_THREE])
    golden("dense_to_moe", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize(("kind", "count"), [("llama", 3), ("dit", 3), ("flux", 9)])
def test_all_experts_with_gates_of_one_are_the_dense_network(kind: str, count: int) -> None:
    program, inputs = captured(kind)
    new, (step,) = run_passes(program, [ALL_ON], [inputs])
    assert len(step.receipt.changed) == count
    torch.testing.assert_close(run(new, inputs), run(program, inputs), atol=1e-5, rtol=1e-5)
    for split in step.plan.decisions.values():
        assert dict(split.errors or ())[3] < 1e-6


@pytest.mark.parametrize("kind", ["llama", "dit", "flux"])
def test_the_way_back_is_exact(kind: str) -> None:
    program, inputs = captured(kind)
    new, (step,) = run_passes(program, [TWO_OF_THREE], [inputs])
    back = to_dense(new, step.plan)
    for old, ffn in zip(program.feed_forwards(), back.feed_forwards(), strict=True):
        assert torch.equal(ffn.up, old.up)
        assert torch.equal(ffn.down, old.down)
        assert (ffn.gate is None) == (old.gate is None)
        assert old.gate is None or torch.equal(ffn.gate, old.gate)
    if kind != "flux":  # there the first matrix also made queries, keys and values
        assert all(map(torch.equal, run(back, inputs), run(program, inputs)))


def test_the_way_back_needs_no_plan(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [TWO_OF_THREE])
    torch.testing.assert_close(run(to_dense(new), [tokens]), run(program, [tokens]))
    with pytest.raises(OptionError, match="no feed-forward network in experts"):
        to_dense(program)


def test_without_experts_a_narrower_network_is_left(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, [DenseToMoE(**HALF, active=0)])
    assert [ffn.ffn_dim for ffn in new.feed_forwards()] == [6, 6, 6]
    for ffn, narrow in zip(program.feed_forwards(), new.feed_forwards(), strict=True):
        shared = step.plan.decisions[ffn.label].shared
        assert torch.equal(narrow.up, ffn.up[shared])
        assert torch.equal(narrow.down_layer.bias, ffn.down_layer.bias)  # type: ignore[arg-type]


def test_the_bias_does_not_depend_on_how_many_are_active(program: Program, tokens: Tensor) -> None:
    silent = dict(program.tensors)
    for name in silent:
        if name.endswith(".down.weight"):
            silent[name] = torch.zeros_like(silent[name])
    old = program.with_(tensors=silent)
    for shared, active in ((0.5, 1), (0.5, 3), (0.0, 2)):
        method = DenseToMoE(experts=3, active=active, shared=shared, importance="random")
        new, _ = run_passes(old, [method])
        torch.testing.assert_close(run(new, [tokens]), run(old, [tokens]))


def test_better_neurons_go_to_the_shared_expert(program: Program) -> None:
    _, (step,) = run_passes(program, [TWO_OF_THREE])
    for ffn in program.feed_forwards():
        bias = ffn.up_layer.bias
        assert bias is not None
        score = ffn.up.square().sum(1) + ffn.down.square().sum(0) + bias.square()
        split = step.plan.decisions[ffn.label]
        rest = score[split.order[6:]].max()
        assert score[split.shared].min() >= rest
        assert sorted(split.order) == list(range(12))
        assert [len(expert) for expert in split.experts] == [2, 2, 2]


@pytest.mark.parametrize("importance", ["taylor", "activation", "magnitude", "random"])
def test_every_ranking_works(program: Program, tokens: Tensor, importance: str) -> None:
    method = DenseToMoE(**HALF | {"importance": importance}, active=1)
    new, (step,) = run_passes(program, [method], [[tokens]])
    assert step.receipt.statistics == {"experts": 9, "unused_experts": unused(step.plan)}
    assert step.certificate is not None
    assert step.certificate.costs["activated_parameters"].predicted < new.cost().parameters


def unused(plan: Any) -> int:
    return sum(split.unused for split in plan.decisions.values())


def test_errors_fall_as_experts_are_added(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [TWO_OF_THREE], [[tokens]])
    for split in step.plan.decisions.values():
        errors = [error for _, error in split.errors or ()]
        assert [k for k, _ in split.errors or ()] == [0, 1, 2, 3]
        assert all(a > b for a, b in pairwise(errors))


def test_an_expert_nobody_visits_is_reported() -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=1, ffn_dim=12)).eval()
    with torch.no_grad():  # all tokens are alike, so all visit the same experts
        model.tokens.weight.copy_(model.tokens.weight[:1].expand(32, 8))
        model.positions.weight.zero_()
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    program = bw.capture(model, (tokens,))
    method = DenseToMoE(**HALF, active=1)
    _, (step,) = run_passes(program, [method], [[tokens]])
    assert step.receipt.statistics["unused_experts"] == 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "unit"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gates(score: str, renormalise: bool) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]])
    index, gates = Gating(2, score, renormalise, 3.0)(logits)
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "unit": logits * 0 + 1}
    expected = scores[score][0, [2, 3]]
    expected = 3 * (expected / expected.sum() if renormalise else expected)
    assert index.tolist() == [[2, 3]]
    torch.testing.assert_close(gates[0], expected)


def test_tokens_do_not_see_each_other(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [TWO_OF_THREE])
    together = run(new, [tokens])[0]
    for row in range(2):
        torch.testing.assert_close(run(new, [tokens[row : row + 1]])[0][0], together[row])


def test_one_token(program: Program) -> None:
    new, _ = run_passes(program, [ALL_ON])
    one = torch.zeros(1, 8, dtype=torch.int64)
    torch.testing.assert_close(run(new, [one]), run(program, [one]))


def test_nan_in_a_router_stays_with_its_token(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [TWO_OF_THREE])
    module = new.regions(Experts)[0]
    x = torch.randn(4, 8)
    x[1] = torch.nan
    y = module.replay([x])[0]
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_networks_too_small_to_gain_stay_dense(program: Program) -> None:
    with pytest.raises(NoMatchError, match=r"is faster dense: of 16 tokens, routing saves"):
        run_passes(program, [DenseToMoE(**HALF, active=2, overhead_flops=10_000)])
    assert len(run_passes(program, [DenseToMoE(**HALF, active=1, overhead_flops=1)])[1]) == 1


def test_declines_what_experts_do_not_divide(program: Program) -> None:
    with pytest.raises(NoMatchError, match="has 12 neurons, of which 9 are not shared"):
        run_passes(program, [DenseToMoE(importance="magnitude")])


def test_declines_a_matrix_shared_with_attention() -> None:
    model = drawn(flux.Flux(flux.TOY_FLUX))
    program = bw.capture(model, model.example_inputs())
    _, (step,) = run_passes(program, [TWO_OF_THREE])
    assert set(step.receipt.skipped.values()) == {
        "shares its last matrix with an attention; canonicalize cuts it in two"
    }
    assert len(step.receipt.changed) == 6


class Tied(nn.Module):
    """Two networks with one first matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.ups[1].weight = self.ups[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def test_declines_tied_weights() -> None:
    program = bw.capture(Tied(), (torch.zeros(2, 4),))
    with pytest.raises(NoMatchError, match="shares a weight with another place"):
        run_passes(program, [TWO_OF_THREE])


def test_scores_without_gradients_are_refused(program: Program, tokens: Tensor) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in program.tensors.items()}
    method = DenseToMoE(**HALF | {"importance": "taylor"}, active=1)
    with pytest.raises(OptionError, match="taylor scores of all neurons are zero"):
        run_passes(program.with_(tensors=tensors), [method], [[tokens]])
    with pytest.raises(OptionError, match="there are none"):
        run_passes(program, [method])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 4, "experts": 3}, "active=4 is out of range; use 0 to experts=3"),
        ({"shared": 1.0}, "shared=1.0 is out of range"),
        ({"experts": 0}, "experts=0 is out of range"),
        ({"score": "argmax"}, "score=argmax is not supported"),
        ({"importance": "luck"}, "importance=luck is not supported"),
        ({"scale": 0.0}, "scale=0.0 is out of range"),
        ({"overhead_flops": -1}, "overhead_flops=-1 is out of range"),
        ({"shared": 0.0, "active": 0}, "leave no neuron"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DenseToMoE(**options)


def test_refuses_a_split_that_loses_neurons(program: Program) -> None:
    _, (step,) = run_passes(program, [TWO_OF_THREE])
    (label, *_) = step.plan.decisions
    lossy = {"shared": [0, 1, 2], "experts": [[3], [4], [5]], "active": 1}
    decisions = {label: lossy}
    with pytest.raises(OptionError, match="does not hold every neuron once"):
        run_passes(program, [TWO_OF_THREE], plans=[{"decisions": decisions}])


@pytest.mark.parametrize("kind", ["llama", "dit", "flux"])
def test_later_passes_find_their_way(kind: str) -> None:
    program, inputs = captured(kind)
    fuse, quantize = FuseProjections(allow_no_match=True), QuantizeWeights()
    new, steps = run_passes(program, [TWO_OF_THREE, fuse, quantize], [inputs])
    routers = [why for why in steps[-1].receipt.skipped.values() if "is a router" in why]
    assert len(routers) == len(steps[0].receipt.changed)
    assert [b.constants()["streams"] for b in new.blocks()] == [
        b.constants()["streams"] for b in program.blocks()
    ]


def test_the_stages_train_what_they_name(program: Program, tokens: Tensor) -> None:
    sets = [[torch.randint(0, 32, (2, 8))] for _ in range(4)]
    new, (step,) = run_passes(
        program, [TWO_OF_THREE], [[tokens]], calibration=sets, recover=Recover(steps=6)
    )
    assert [t.stage for t in step.receipt.trained] == ["shared experts", "routed experts"]
    assert all(t.after < t.before for t in step.receipt.trained)
    untrained, _ = run_passes(program, [TWO_OF_THREE], [[tokens]])
    moved = {n for n, t in new.tensors.items() if not torch.equal(t, untrained.tensors[n])}
    assert moved
    assert all("up_down." in name or name.endswith("down.bias") for name in moved)
    assert any(name.endswith(".router") for name in moved)


def test_module_alone() -> None:
    torch.manual_seed(0)
    neurons = Neurons(torch.randn(6, 4), torch.randn(4, 6), "gelu", up_bias=torch.randn(6))
    split = Split([0, 3], [[1, 2], [5, 4]], 2)
    x = torch.randn(3, 5, 4)
    network = routed(neurons, split, Gating(2), train_router=True)
    torch.testing.assert_close(network(x), neurons(x))
    narrow = routed(neurons, replace(split, active=0), Gating(0), train_router=True)
    assert isinstance(narrow, Network)


def test_the_caller_says_how_many_experts_are_visited(program: Program, tokens: Tensor) -> None:
    new, _ = run_passes(program, [replace(ALL_ON, active=1)])
    told = dynamic_experts(new)
    verify(told)
    costs = []
    for k in range(4):
        visits = torch.zeros(k, dtype=torch.int64)
        fixed, _ = run_passes(program, [replace(ALL_ON, active=k)])
        torch.testing.assert_close(run(told, [tokens, visits]), run(fixed, [tokens]))
        costs.append(told.cost({"visits": k}).flops)
    assert costs == sorted(set(costs))
    data = to_json(told)
    assert from_json(data, dict(told.tensors)).text() == told.text()
    with pytest.raises(OptionError, match="has an argument 'visits' already"):
        dynamic_experts(told)
    with pytest.raises(OptionError, match="no feed-forward network in experts"):
        dynamic_experts(program)
    with pytest.raises(OptionError, match=r"visits in 0\.\.3"):
        told.signature.bind((tokens,), {"visits": torch.zeros(4, dtype=torch.int64)})
