"""EmergentMoE: groups keys in equal clusters, routes by their means, adds nothing, folds back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Experts
from blockwright.ir.recognize.place import Place
from blockwright.ir.run import run
from blockwright.ir.taps import tapped
from blockwright.models import llama
from blockwright.passes import EmergentMoE
from blockwright.passes.emergent_moe import router_keys
from blockwright.passes.shared.clusters import assigned, balanced_clusters
from blockwright.passes.shared.to_dense import to_dense

ONE_OF_THREE = EmergentMoE(experts=3, active=1)
ALL = EmergentMoE(experts=3, active=3)


def test_golden(program: Program, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [ONE_OF_THREE])
    golden("emergent_moe", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_all_experts_are_the_dense_network(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, [ALL], [[tokens]])
    torch.testing.assert_close(run(new, [tokens]), run(program, [tokens]), atol=1e-5, rtol=1e-5)
    assert step.receipt.statistics == {"experts": 9, "unused_experts": 0}


def test_folds_back_bit_by_bit(program: Program, tokens: Tensor) -> None:
    new, (step,) = run_passes(program, [ONE_OF_THREE])
    back = to_dense(new, step.plan)
    assert torch.equal(run(back, [tokens])[0], run(program, [tokens])[0])
    assert back.cost().parameters == program.cost().parameters
    torch.testing.assert_close(run(to_dense(new), [tokens]), run(program, [tokens]))


def test_adds_no_parameter(program: Program) -> None:
    new, (step,) = run_passes(program, [ONE_OF_THREE])
    assert step.receipt.parameters[0] == step.receipt.parameters[1]
    assert not [name for name in new.parameters if name.endswith("router")]
    assert new.cost().activated_parameters < program.cost().parameters


def test_scores_are_mean_answers_of_an_expert(program: Program) -> None:
    new, (step,) = run_passes(program, [ONE_OF_THREE])
    x = torch.randn(5, 8)
    for ffn, region in zip(program.feed_forwards(), new.regions(Experts), strict=True):
        assert region.router is not None
        answers = F.linear(x, ffn.up)
        groups = step.plan.decisions[ffn.label].experts
        means = torch.stack([answers[:, group].mean(dim=1) for group in groups], dim=1)
        torch.testing.assert_close(F.linear(x, region.router.weight), means)


def test_gated_networks_group_their_gates() -> None:
    torch.manual_seed(0)
    model = llama.Llama(llama.TOY).eval()
    (tokens,) = model.example_inputs()
    program = bw.capture(model, (tokens,))
    new, (step,) = run_passes(program, [ALL], [[tokens]])
    torch.testing.assert_close(run(new, [tokens]), run(program, [tokens]))
    ffn, region = program.feed_forwards()[0], new.regions(Experts)[0]
    assert ffn.gate is not None
    assert region.router is not None
    assert step.plan.decisions[ffn.label].experts == balanced_clusters(ffn.gate, 3)
    first = step.plan.decisions[ffn.label].experts[0]
    torch.testing.assert_close(region.router.weight[0], ffn.gate[first].mean(dim=0))


def test_routers_follow_their_experts(program: Program) -> None:
    new, _ = run_passes(program, [ONE_OF_THREE])
    now = router_keys(new)
    assert all(torch.equal(key, new.tensors[name]) for name, key in now.items())
    doubled = {n: 2 * t if n.endswith("up_down.up") else t for n, t in new.tensors.items()}
    trained = new.with_(tensors=doubled)
    for name, key in router_keys(trained).items():
        torch.testing.assert_close(key, 2 * new.tensors[name])
    for name, key in router_keys(trained, momentum=0.5).items():
        torch.testing.assert_close(key, 1.5 * new.tensors[name])


def test_no_gradient_reaches_a_router_or_an_expert_not_visited(program: Program) -> None:
    new, _ = run_passes(program, [ONE_OF_THREE])
    module = new.module()
    for weight in module.parameters():
        weight.requires_grad_()
    one = torch.zeros(1, 1, dtype=torch.int64)
    module(one.expand(1, 8))[0][:, 0].sum().backward()
    held = dict(module.named_parameters())
    assert not [name for name in held if "router" in name]
    region = new.regions(Experts)[-1]
    (index,) = tapped(new, [Place(region.instance, region.index)])(one.expand(1, 8))
    grad = held["blocks.2.up_down.up"].grad
    assert grad is not None
    assert [bool(part.any()) for part in grad] == [i == index[0, 0].item() for i in range(3)]


@pytest.mark.parametrize("cluster", ["contiguous", "random", "balanced"])
def test_every_grouping_holds_every_neuron_once(program: Program, cluster: str) -> None:
    _, (step,) = run_passes(program, [EmergentMoE(experts=4, active=2, cluster=cluster)])
    for split in step.plan.decisions.values():
        assert sorted(split.order) == list(range(12))
        assert {len(group) for group in split.experts} == {3}


def test_clusters_find_what_was_planted() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:4]
    owner = torch.arange(4).repeat_interleave(5)[torch.randperm(20, generator=generator)]
    x = centres[owner] * 3 + 0.1 * torch.randn(20, 8, generator=generator)
    for group in balanced_clusters(x, 4):
        assert len({int(owner[i]) for i in group}) == 1


def test_the_auction_ends_near_the_best_assignment() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        likeness = torch.rand(12, 3, generator=generator, dtype=torch.float64)
        owner = assigned(likeness, 4, likeness.new_zeros(3))
        assert owner.bincount().tolist() == [4, 4, 4]
        places = likeness.repeat_interleave(4, dim=1).numpy()
        best = places[optimize.linear_sum_assignment(places, maximize=True)].sum()
        assert likeness[range(12), owner].sum() >= best - 12e-3
    with pytest.raises(ValueError, match="12 vectors do not fill 3 groups of 5"):
        assigned(likeness, 5, likeness.new_zeros(3))


def test_declines_what_experts_do_not_divide(program: Program) -> None:
    with pytest.raises(NoMatchError, match="has 12 neurons, which 5 experts do not divide"):
        run_passes(program, [EmergentMoE(experts=5, active=1)])


def test_declines_by_pattern(program: Program) -> None:
    method = EmergentMoE(experts=3, active=1, include=("blocks.2.*",))
    _, (step,) = run_passes(program, [method])
    assert step.receipt.changed == ("blocks.2.up_down",)
    assert set(step.receipt.skipped.values()) == {"is excluded by pattern"}


def test_declines_to_cluster_no_weights() -> None:
    with torch.device("meta"):
        model = llama.Llama(llama.TOY).eval()
        inputs = model.example_inputs()
    program = bw.capture(model, inputs)
    with pytest.raises(NoMatchError, match="has no weights to cluster"):
        run_passes(program, [ONE_OF_THREE])
    new, _ = run_passes(program, [EmergentMoE(experts=3, active=1, cluster="contiguous")])
    assert new.cost().parameters == program.cost().parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts=0 is none"),
        ({"active": 17}, "active=17 is out of range; use 1 to 16"),
        ({"active": 0}, "active=0 is out of range"),
        ({"cluster": "sorted"}, "cluster=sorted is not supported"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EmergentMoE(**options)


class UpDown(nn.Module):
    """A network whose layers are called as its experts' weights will be."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), UpDown()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_no_weight_is_called_like_the_module_of_another() -> None:
    model, x = nn.Sequential(Residual(), Residual()).eval(), torch.randn(2, 3, 8)
    engine = bw.compile(model, [ALL], (x,), backend="eager")
    assert {"0.mlp.down.bias", "0.mlp.down#1"} <= set(engine.program.tensors)
    torch.testing.assert_close(engine(x), model(x).detach())
