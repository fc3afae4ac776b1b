"""WideNet: one set of layers for all blocks, experts chosen as the paper says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.ir.capture import capture
from blockwright.models import widenet
from blockwright.models.widenet import (
    Mixture,
    WideConfig,
    WideGPT,
    WideStack,
    WideViT,
    balance_loss,
    choices,
    in_time,
)

SMALL = WideConfig(dim=8, heads=2, depth=3, ffn_dim=12)


def drawn(module: nn.Module, std: float = 0.5) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def test_a_checkpoint_holds_shared_layers_once() -> None:
    model = drawn(WideViT(widenet.TOY))
    state = model.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert len({name.split(".")[2] for name in state if name.startswith("stack.shared")}) == 1
    other = drawn(WideViT(widenet.TOY))
    other.load_state_dict(state)
    (inputs,) = model.example_inputs()
    assert torch.equal(other(inputs), model(inputs))


def test_a_program_keeps_the_sharing_and_shows_every_block() -> None:
    model = drawn(WideGPT(widenet.TOY_GPT))
    program = capture(model, model.example_inputs())
    assert program.cost().parameters == sum(p.numel() for p in model.parameters())
    assert len(program.blocks()) == 3
    assert [attention.mask for attention in program.attentions()] == ["causal"] * 3


def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_calls(x: Tensor) -> None:
    shared = drawn(WideStack(replace(SMALL, experts=1), causal=False)).double()
    copies = WideStack(replace(SMALL, experts=1, groups=3), causal=False).double()
    copies.blocks.load_state_dict(shared.blocks.state_dict())
    for copy in copies.shared:
        copy.load_state_dict(shared.shared[0].state_dict())
    x = x.double()
    assert torch.equal(shared(x), copies(x))
    for stack in (shared, copies):
        stack(x).square().sum().backward()
    for name, parameter in shared.shared[0].named_parameters():
        total = sum(copy.get_parameter(name).grad for copy in copies.shared)
        torch.testing.assert_close(parameter.grad, total)


def test_equal_experts_are_one_expert(x: Tensor) -> None:
    mixture = drawn(Mixture(replace(SMALL, chosen=4)))
    for expert in mixture.experts:
        expert.load_state_dict(mixture.experts[0].state_dict())
    torch.testing.assert_close(mixture(x), mixture.experts[0](x), rtol=1e-6, atol=1e-6)


def test_only_chosen_experts_count_and_gates_do_not_add_up_to_one(x: Tensor) -> None:
    mixture = drawn(Mixture(SMALL))
    routes: list[Tensor] = []
    y = mixture(x, routes)
    (route,) = routes
    gates = mixture.gates(route.view(2, 5, 4))
    assert ((gates > 0).sum(-1) == 2).all()
    assert torch.equal(gates[gates > 0], route.view(2, 5, 4)[gates > 0])
    assert (gates.sum(-1) < 1).all()
    outputs = torch.stack([expert(x) for expert in mixture.experts], dim=-2)
    torch.testing.assert_close(y, (gates[..., None] * outputs).sum(-2))
    mixture.config = replace(SMALL, renormalize=True)
    torch.testing.assert_close(mixture.gates(route).sum(-1), torch.ones(10))


def test_experts_take_the_first_of_their_tokens() -> None:
    chosen = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    assert in_time(chosen, 0.5).tolist() == [
        [True, False], [True, True], [False, False], [False, True],
    ]  # fmt: skip
    assert torch.equal(in_time(chosen, 1.0), chosen)


def test_capacity_and_noise_are_for_training_only(x: Tensor) -> None:
    tight = drawn(Mixture(replace(SMALL, capacity=0.1, noise=0.0)))
    free = drawn(Mixture(replace(SMALL, capacity=None, noise=0.0)))
    assert torch.equal(tight(x), free(x))
    assert torch.equal(free.train()(x), free.eval()(x))
    assert not tight.train()(x).any()  # room for less than one token
    noisy = drawn(Mixture(replace(SMALL, capacity=None))).train()
    assert not torch.equal(noisy(x), noisy(x))


def test_groups_have_layers_of_their_own_and_only_the_last_mixes() -> None:
    stack = WideStack(replace(SMALL, depth=6, groups=3), causal=False)
    assert [isinstance(shared.ffn, Mixture) for shared in stack.shared] == [False, False, True]
    routes: list[Tensor] = []
    stack(torch.randn(1, 4, 8), routes)
    assert len(routes) == 2


def test_norms_may_be_shared_too() -> None:
    private, shared = (
        WideStack(replace(SMALL, private_norms=own), causal=False) for own in (True, False)
    )
    count = [sum(p.numel() for p in stack.parameters()) for stack in (private, shared)]
    assert count[0] - count[1] == 2 * 4 * SMALL.dim  # two more blocks of four vectors


def test_the_second_activation_is_an_option(x: Tensor) -> None:
    plain, twice = (
        drawn(WideStack(replace(SMALL, experts=1, activate_twice=on), causal=False))
        for on in (False, True)
    )
    inner = plain.shared[0].ffn(x)
    torch.testing.assert_close(
        twice.shared[0].ffn(x), nn.functional.gelu(inner, approximate="tanh")
    )


def test_the_balance_loss_is_one_per_call_where_loads_are_even() -> None:
    even = torch.eye(4) * 0.4 + 0.15  # each token prefers another expert
    assert balance_loss([even, even], 1).item() == pytest.approx(2)
    uneven = even[:1].expand(4, -1)
    assert balance_loss([uneven], 1).item() == pytest.approx(4 * even[0, 0].item())


def test_choices_are_the_likeliest() -> None:
    assert choices(torch.tensor([[0.1, 0.4, 0.3, 0.2]]), 2).tolist() == [[False, True, True, False]]


def test_wide_decoders_do_not_look_ahead() -> None:
    model = drawn(WideGPT(widenet.TOY_GPT))
    (tokens,) = model.example_inputs()
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])
