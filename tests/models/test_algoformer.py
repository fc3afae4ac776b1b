"""AlgoFormer: the loop is what it would be written out, and turns as often as one asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.ir.capture import capture
from blockwright.models import algoformer
from blockwright.models.algoformer import AlgoFormer, AlgoFormerConfig, repeat

TOY = replace(algoformer.TOY, inject="nothing")


def drawn(config: AlgoFormerConfig) -> Any:
    torch.manual_seed(0)
    model = AlgoFormer(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)


def test_one_turn_is_an_ordinary_transformer(x: Tensor) -> None:
    looped, plain = drawn(TOY), drawn(replace(TOY, pre=3, loop=0, post=0, times=0))
    for block, source in zip(plain.pre, (*looped.pre, *looped.loop, *looped.post), strict=True):
        block.load_state_dict(source.state_dict())
    for name in ("embed", "positions", "norm", "head"):
        plain.get_submodule(name).load_state_dict(looped.get_submodule(name).state_dict())
    assert torch.equal(looped(x, times=1), plain(x))


def test_turns_are_copies_of_a_block_and_no_weights(x: Tensor) -> None:
    looped, copies = drawn(TOY), drawn(replace(TOY, loop=4, times=1))
    state = {
        name.replace("loop.0", f"loop.{index}"): tensor
        for index in range(4)
        for name, tensor in looped.state_dict().items()
    }
    copies.load_state_dict(state)
    before = list(looped.state_dict())
    assert torch.equal(looped(x, times=4), copies(x))
    assert list(looped.state_dict()) == before
    for model, arguments in ((looped, (x, 4)), (copies, (x,))):
        model(*arguments).square().sum().backward()
    for name, parameter in looped.loop[0].named_parameters():
        total = sum(block.get_parameter(name).grad for block in copies.loop)
        torch.testing.assert_close(parameter.grad, total)


def test_predictions_of_the_last_turns_are_those_of_shorter_loops(x: Tensor) -> None:
    model = drawn(algoformer.TOY)
    found = model.predictions(x, times=5, last=3)
    for times, outputs in zip((3, 4, 5), found, strict=True):
        assert torch.equal(outputs, model(x, times))


def test_a_loop_from_zero_first_sees_what_is_injected(x: Tensor) -> None:
    zero = drawn(replace(TOY, pre=0, inject="embedded", from_zero=True))
    plain = drawn(replace(TOY, pre=0))
    assert torch.equal(zero(x, times=1), plain(x, times=1))
    assert not torch.equal(zero(x, times=2), plain(x, times=2))


@pytest.mark.parametrize("inject", ["nothing", "prepared", "embedded"])
def test_what_is_injected_is_added_before_every_turn(inject: Any, x: Tensor) -> None:
    model = drawn(replace(TOY, inject=inject, norm_between=True))
    embedded = model.embed(x) + model.positions(torch.arange(6))
    state = prepared = model.pre(embedded)
    added = {"nothing": 0, "prepared": prepared, "embedded": embedded}[inject]
    for _ in range(3):
        state = model.between(model.loop(state + added))
    torch.testing.assert_close(model(x), model.head(model.norm(model.post(state))))


def gradient(model: AlgoFormer, x: Tensor) -> Tensor:
    model.zero_grad()
    model.train()(x).square().sum().backward()
    found = model.loop[0].down.weight.grad
    assert found is not None
    return found.clone()


def test_a_window_as_long_as_the_loop_forgets_nothing(x: Tensor) -> None:
    model = drawn(algoformer.TOY)
    full = gradient(model, x)
    for window, same in ((3, True), (9, True), (1, False)):
        model.config = replace(algoformer.TOY, window=window)
        assert torch.equal(gradient(model, x), full) is same


def test_what_lies_before_the_window_computes_no_gradients() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    *_, last = repeat(lambda z: weight * z, torch.tensor(1.0), 3, window=1)
    last.backward()
    assert last == 8
    assert weight.grad == 4  # 12 with all three


def test_a_program_has_one_block_per_turn_and_the_weights_of_one() -> None:
    model = drawn(algoformer.TOY).float()
    program = capture(model, model.example_inputs())
    assert len(program.blocks()) == 1 + 3 + 1
    assert program.cost().parameters == sum(p.numel() for p in model.parameters())
