"""What EMoE claims, on toys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts
from blockwright.ir.run import run
from blockwright.passes import EmergentMoE
from blockwright.passes.emergent_moe import router_keys
from blockwright.passes.shared.moe_curve import inputs_of
from blockwright.passes.shared.neurons import Neurons
from blockwright.passes.shared.to_dense import to_dense
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy, deep_gpt

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(3600)]
METHOD = "emoe"
EXPERTS = 16


def quality(toy: Toy, program: Program) -> float:
    return toy.quality(lambda *inputs: run(program, inputs)[0])["bits_per_character"]


def bottom(program: Program) -> Program:
    """The program with routers that choose the experts they would choose last."""
    turned = {name: -key for name, key in router_keys(program).items()}
    return program.with_(tensors={**program.tensors, **turned})


def test_all_experts_are_the_model_and_it_folds_back(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    inputs = list(toy.example_inputs)
    program = bw.capture(toy.model, toy.example_inputs)
    new, (step,) = run_passes(program, [EmergentMoE(experts=EXPERTS, active=EXPERTS)])
    apart = (run(new, inputs)[0] - run(program, inputs)[0]).abs().max().item()
    exact = torch.equal(run(to_dense(new, step.plan), inputs)[0], run(program, inputs)[0])
    added = new.cost().parameters - program.cost().parameters
    holds = apart < 1e-4 and exact and not added
    acceptance(
        METHOD, 1, "All experts on is the model, folding back is exact, nothing is added.",
        naive="the dense model", holds=holds,
        figure=f"logits {apart:.1e} apart, back {'bit-exact' if exact else 'not exact'},"
        f" {added} parameters more",
    )  # fmt: skip
    assert holds


def test_clustered_experts_are_chosen_better(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    dense = quality(toy, program)
    for active in (8, 4):
        found = {}
        for cluster in ("balanced", "random"):
            method = EmergentMoE(experts=EXPERTS, active=active, cluster=cluster)
            found[cluster], _ = run_passes(program, [method])
        bits = {name: quality(toy, new) for name, new in found.items()}
        last = quality(toy, bottom(found["balanced"]))
        share = f"{active} of {EXPERTS} experts in all layers, untrained"
        acceptance(
            METHOD, 2, f"{share}: clusters lose less than random groups with the same router.",
            naive="random groups", holds=bits["balanced"] < bits["random"],
            figure=f"{bits['balanced']:.3f} against {bits['random']:.3f} bits per character"
            f" (dense {dense:.3f})",
        )  # fmt: skip
        acceptance(
            METHOD, 2, f"{share}: the nearest experts lose less than the farthest.",
            naive="the experts with the lowest scores", holds=bits["balanced"] < last,
            figure=f"{bits['balanced']:.3f} against {last:.3f} bits per character",
        )  # fmt: skip
        assert bits["balanced"] < last
        assert bits["random"] < last


def test_one_layer_alone(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    label = program.feed_forwards()[6].label
    bits = {}
    for cluster in ("balanced", "random"):
        method = EmergentMoE(experts=EXPERTS, active=4, cluster=cluster, include=(label,))
        bits[cluster] = quality(toy, run_passes(program, [method])[0])
    acceptance(
        METHOD, 2, "In one layer alone, 4 of 16 experts, clusters lose less than random groups.",
        naive="random groups", holds=bits["balanced"] < bits["random"],
        figure=f"{bits['balanced']:.4f} against {bits['random']:.4f} bits per character",
    )  # fmt: skip
    assert all(found < quality(toy, program) + 0.1 for found in bits.values())


def test_clusters_are_coherent(acceptance: Acceptance) -> None:
    toy = deep_gpt()
    program = bw.capture(toy.model, toy.example_inputs)
    networks = program.feed_forwards()
    seen = inputs_of(program, networks, [list(i) for i in toy.calibration(2)])
    mass = {}
    for cluster in ("balanced", "random"):
        _, (step,) = run_passes(program, [EmergentMoE(experts=EXPERTS, cluster=cluster)])
        shares = [
            captured_mass(Neurons.of(ffn), step.plan.decisions[ffn.label].experts, seen[ffn.label])
            for ffn in networks
        ]
        mass[cluster] = sum(shares) / len(shares)
    acceptance(
        METHOD, 3, "The quarter of the experts that answer most hold more of the positive"
        " activations when they are clusters.",
        naive="random groups", figure=f"{mass['balanced']:.3f} against {mass['random']:.3f}",
        holds=mass["balanced"] > mass["random"],
    )  # fmt: skip
    assert mass["balanced"] > mass["random"]


def captured_mass(neurons: Neurons, experts: list[list[int]], x: Tensor) -> float:
    """Return the share of positive activations in each token's most active quarter of experts."""
    answers = neurons.hidden(x).clamp_min(0)
    sums = torch.stack([answers[:, group].sum(dim=1) for group in experts], dim=1)
    most = sums.topk(len(experts) // 4, dim=1).values.sum(dim=1)
    return (most / sums.sum(dim=1).clamp_min(1e-9)).mean().item()


def test_tuning_as_experts(toy_vit: Toy, acceptance: Acceptance) -> None:
    images, labels = toy_vit.validation
    shifted = images.flip(-1)  # digits in a mirror
    known, held = (shifted[:240], labels[:240]), (shifted[240:], labels[240:])
    program = bw.capture(toy_vit.model, toy_vit.example_inputs)
    method = EmergentMoE(experts=EXPERTS, active=8, include=("blocks.2.*", "blocks.3.*"))
    experts, (step,) = run_passes(program, [method])
    dense = accuracy(tuned(program, *known), *held)
    trained = tuned(experts, *known)
    sparse, folded = (accuracy(p, *held) for p in (trained, to_dense(trained, step.plan)))
    acceptance(
        METHOD, 4, "Tuned to a new task as experts, the model is as accurate as tuned dense, within"
        " 0.3 points.",
        naive="tuning the dense model for as many steps", holds=sparse >= dense - 0.3,
        figure=f"{sparse:.2f} against {dense:.2f} % on mirrored digits",
    )  # fmt: skip
    acceptance(
        METHOD, 4, "Folded back after tuning, it is as accurate as before, within 0.2 points.",
        naive="the tuned experts", figure=f"{folded:.2f} against {sparse:.2f} %",
        holds=abs(folded - sparse) <= 0.2,
    )  # fmt: skip
    assert sparse > 50


def tuned(program: Program, images: Tensor, labels: Tensor, steps: int = 150) -> Program:
    """Return the program trained on a task, routers following their experts."""
    program = program.with_(tensors={n: t.clone() for n, t in program.tensors.items()})
    module: fx.GraphModule = program.module()  # over the program's tensors, trained in place
    weights = [weight.requires_grad_() for weight in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (40,), generator=generator)
        loss = F.cross_entropy(module(images[chosen])[0], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if program.regions(Experts):
            with torch.no_grad():
                for name, key in router_keys(program).items():
                    program.tensors[name].copy_(key)
    return program


def accuracy(program: Program, images: Tensor, labels: Tensor) -> float:
    """Return the percentage read right, in batches of the captured size."""
    logits = torch.cat([run(program, [part])[0] for part in images.split(40)])
    return 100 * (logits.argmax(-1) == labels).float().mean().item()
