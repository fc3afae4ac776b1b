"""What Dense2MoE claims, on toys, and at the published sizes without weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.calibration import JudgedSets
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.driver.zoo import find_preset
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts
from blockwright.ir.run import run
from blockwright.passes import Canonicalize, DenseToMoE
from blockwright.passes.shared.dynamic import dynamic_experts
from blockwright.passes.shared.moe import Gating, Split, routed
from blockwright.passes.shared.neurons import Network, Neurons
from blockwright.passes.shared.to_dense import to_dense
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy, deep_gpt

pytestmark = pytest.mark.acceptance
METHOD = "dense2moe"
SEEDS = (0, 1, 2)
STEPS = 60


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["toy_vit", "toy_dit"])
def test_exact_and_invertible(
    name: str, request: pytest.FixtureRequest, acceptance: Acceptance
) -> None:
    toy: Toy = request.getfixturevalue(name)
    inputs = list(toy.example_inputs)
    program = bw.capture(toy.model, tuple(inputs))
    method = DenseToMoE(active=12, score="unit", importance="magnitude")
    new, (step,) = run_passes(program, [method])
    apart = (run(new, inputs)[0] - run(program, inputs)[0]).abs().max().item()
    back = to_dense(new, step.plan)
    exact = all(map(torch.equal, run(back, inputs), run(program, inputs)))
    acceptance(
        METHOD, 1, f"All experts, gates of one, are the dense {name[4:]}; the way back is exact.",
        naive="the dense model",
        figure=f"{apart:.1e} apart; back {'bit-exact' if exact else 'not'}",
        holds=apart < 1e-5 and exact,
    )  # fmt: skip
    assert apart < 1e-5
    assert exact


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_taylor_finds_the_neurons_to_share(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    bits: dict[str, list[float]] = {}
    for seed in SEEDS:
        judged = JudgedSets(program, toy.judged(8, seed), toy.task.loss)
        for importance in ("taylor", "magnitude", "random"):
            method = DenseToMoE(active=0, importance=importance, seed=seed)
            new, _ = run_passes(program, [method], calibration=judged, recover=False)
            bits.setdefault(importance, []).append(quality(toy, new))
    mean = {name: statistics.mean(found) for name, found in bits.items()}
    for naive in ("magnitude", "random"):
        acceptance(
            METHOD, 2, "The quarter of the neurons Taylor scores keep, alone and untrained, loses"
            f" less than the quarter by {naive} (3 seeds).",
            naive=naive, holds=mean["taylor"] < mean[naive],
            figure=f"{mean['taylor']:.3f} against {mean[naive]:.3f} bits per character"
            f" (dense {toy.quality()['bits_per_character']:.3f})",
        )  # fmt: skip
    assert mean["taylor"] < min(mean["magnitude"], mean["random"])


def quality(toy: Toy, program: Program, visits: int | None = None) -> float:
    told = [] if visits is None else [torch.zeros(visits, dtype=torch.int64)]
    return toy.quality(lambda *inputs: run(program, [*inputs, *told])[0])["bits_per_character"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_trained_experts_improve_with_their_number(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    judged = JudgedSets(program, toy.judged(40), toy.task.loss)
    pruned = {
        shared: run_passes(program, [DenseToMoE(active=0, shared=shared, experts=experts)],
                           calibration=judged, recover=Recover(steps=2 * STEPS))[0]
        for shared, experts in ((0.25, 12), (0.375, 10))
    }  # fmt: skip
    method = DenseToMoE(active=2, scale=1.0)
    new, (step,) = run_passes(program, [method], calibration=judged, recover=Recover(steps=STEPS))
    told = dynamic_experts(new)
    bits = {k: quality(toy, told, k) for k in (0, 1, 2, 4, 12)}
    text = ", ".join(f"{value:.3f} at k={k}" for k, value in bits.items())
    improves = bits[0] > bits[1] > bits[2] > bits[4]
    acceptance(
        METHOD, 3, "After both stages more experts are better, without training for their number.",
        naive="k = 0, the shared expert alone", figure=f"{text} bits per character", holds=improves,
    )  # fmt: skip
    floor, equal = quality(toy, pruned[0.25]), quality(toy, pruned[0.375])
    acceptance(
        METHOD, 3, "Two of twelve experts beat the shared expert alone, trained for as long.",
        naive="a network of the shared neurons, same steps", holds=bits[2] < floor,
        figure=f"{bits[2]:.3f} against {floor:.3f} bits per character",
    )  # fmt: skip
    acceptance(
        METHOD, 3, f"Experts beat a network pruned to the activated width, {2 * STEPS} steps each.",
        naive="Taylor pruning to 37.5 % of the neurons, same steps", holds=bits[2] < equal,
        figure=f"{bits[2]:.3f} against {equal:.3f} bits per character",
    )  # fmt: skip
    assert bits[2] < bits[0]
    assert len(step.receipt.trained) == 2


def planted(seed: int, groups: int = 4, size: int = 8, dim: int = 16) -> tuple[Neurons, Tensor]:
    """A network whose neurons answer one cluster of inputs each, and inputs of all clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[:groups] * 4
    owner = torch.arange(groups).repeat_interleave(size)
    up = centres[owner] / 4 + 0.3 * torch.randn(groups * size, dim, generator=generator)
    bias = torch.full((groups * size,), -2.0)
    down = torch.randn(dim, groups * size, generator=generator)
    x = centres[torch.randint(groups, (2048,), generator=generator)]
    x = x + 0.2 * torch.randn(x.shape, generator=generator)
    return Neurons(up, down, "relu", up_bias=bias), x


def test_planted_modules_are_found(acceptance: Acceptance) -> None:
    errors: dict[str, list[float]] = {"routed": [], "pruned": []}
    for seed in SEEDS:
        neurons, x = planted(seed)
        keep = (neurons.hidden(x).abs().mean(0) * neurons.down.norm(dim=0)).topk(8).indices
        split = Split([], [list(range(g * 8, g * 8 + 8)) for g in range(4)], 1)
        network = routed(neurons, split, Gating(1, "softmax", scale=1.0), train_router=True)
        errors["routed"].append(trained_error(network, neurons, x))
        errors["pruned"].append(trained_error(Network(neurons.take(keep.tolist())), neurons, x))
    routed_, pruned = (statistics.mean(errors[name]) for name in ("routed", "pruned"))
    acceptance(
        METHOD, 3, "Where a network has modules, a trained router reaches far less error than any"
        " pruning to the same activated width (3 seeds).",
        naive="the 8 strongest of 32 neurons, trained as long",
        figure=f"{routed_:.3f} against {pruned:.3f} of the squared output",
        holds=routed_ < pruned / 2,
    )  # fmt: skip
    assert routed_ < pruned / 2


def trained_error(network: torch.nn.Module, teacher: Neurons, x: Tensor) -> float:
    """Distil a network on half of the inputs; return its error on the other, relative."""
    for weight in network.parameters():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    known, held = x[::2], x[1::2]
    for _ in range(300):
        loss = F.mse_loss(network(known), teacher(known))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (F.mse_loss(network(held), teacher(held)) / teacher(held).square().mean()).item()


PUBLISHED: Sequence[tuple[str, dict[str, int], int, int, tuple[float, float] | None]] = (
    ("dit-xl/2", {}, 674_834_720, 489_346_592, None),
    ("flux.1-dev", {"words": 64}, 11_901_408_320, 8_317_496_384, (66.00, 43.42)),
)


@pytest.mark.parametrize(("name", "sizes", "before", "after", "tera"), PUBLISHED)
def test_published_sizes(
    name: str,
    sizes: dict[str, int],
    before: int,
    after: int,
    tera: tuple[float, float] | None,
    acceptance: Acceptance,
) -> None:
    preset = find_preset(name)
    assert preset is not None
    model = preset.sketch()
    offered: Any = model.example_inputs
    inputs = tuple(value.to("meta") for value in offered(**{**preset.sizes, **sizes}))
    program, _ = run_passes(bw.capture(model, inputs), [Canonicalize(allow_no_match=True)])
    new, _ = run_passes(program, [DenseToMoE()], verify_each=False)
    old_cost, cost = program.cost(), new.cost()
    found = (old_cost.parameters, cost.activated_parameters)
    acceptance(
        METHOD, 5, f"{name}: parameters, and those activated by 1S12E2A with modulation kept.",
        naive="the dense model", figure=" -> ".join(f"{n:,}" for n in found),
        holds=found == (before, after),
    )  # fmt: skip
    matrices = [layer.weight.numel() for ffn in program.feed_forwards() for layer in ffn.layers]
    kept = sum(
        sum(layer.weight.numel() for layer in r.layers) + routed_numel(r)
        for r in new.regions(Experts)
    )
    acceptance(
        METHOD, 5, f"{name}: weights of feed-forward networks a token visits.", naive="all of them",
        figure=f"{100 * (kept / sum(matrices) - 1):.1f} %", holds=kept * 8 == sum(matrices) * 3,
    )  # fmt: skip
    assert found == (before, after)
    assert kept * 8 == sum(matrices) * 3
    if tera is not None:
        flops = (old_cost.flops / 1e12, cost.flops / 1e12)
        near = all(abs(ours / theirs - 1) < 0.01 for ours, theirs in zip(flops, tera, strict=True))
        acceptance(
            METHOD, 5, f"{name}: TFLOPs within 1 % of the published {tera[0]} and {tera[1]}.",
            naive="the dense model", figure=f"{flops[0]:.2f} -> {flops[1]:.2f}", holds=near,
        )  # fmt: skip
        assert near


def routed_numel(region: Experts) -> int:
    """Count the weights of the experts one token visits, matrices only."""
    assert region.active is not None
    stored = sum(w.numel() for name, w in region.weights().items() if "bias" not in name)
    return stored * region.active // region.experts
