"""Generation on engines: the same tokens as the model without a cache, drawn as asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import blockwright as bw
from blockwright.backends.engine import Engine
from blockwright.driver.generate import choose
from blockwright.ir.errors import OptionError
from blockwright.models.llama import TOY, Llama
from blockwright.passes import KVCache


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(TOY).eval()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


@pytest.fixture(scope="module")
def engine(model: Llama, prompt: Tensor) -> Engine:
    return bw.compile(
        model, passes=[KVCache(length=24)], example_inputs=(prompt,), backend="eager",
        dynamic_shapes={"tokens": {1: Dim("seq", min=1, max=24)}},
    )  # fmt: skip


def by_hand(model: Llama, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_greedy_is_what_the_whole_sequence_gives(
    model: Llama, engine: Engine, prompt: Tensor
) -> None:
    expected = by_hand(model, prompt, 10)
    assert torch.equal(bw.generate(engine, prompt, new_tokens=10), expected)
    session = engine.session()
    first = bw.generate(session, prompt, new_tokens=4)
    rest = bw.generate(session, first[:, -1:], new_tokens=6)
    assert torch.equal(torch.cat([first, rest[:, 1:]], dim=1), expected)


def test_drawing_repeats_and_stays_within_the_likeliest(engine: Engine, prompt: Tensor) -> None:
    options = {"new_tokens": 8, "temperature": 1.5}
    one, same, other = (bw.generate(engine, prompt, seed=s, **options) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    greedy = bw.generate(engine, prompt, new_tokens=8)
    assert torch.equal(bw.generate(engine, prompt, top_k=1, **options), greedy)
    assert torch.equal(bw.generate(engine, prompt, top_p=1e-9, **options), greedy)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)
    draws = torch.Generator().manual_seed(0)
    found = choose(logits, draws).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, logits[0].exp(), atol=0.015, rtol=0)
    found = choose(logits, draws, top_p=0.7).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)


def test_stops(engine: Engine, prompt: Tensor) -> None:
    whole = bw.generate(engine, prompt, new_tokens=10)
    stop = int(whole[0, 5])
    found = bw.generate(engine, prompt, new_tokens=10, stop=[stop])
    assert found[0, 5:].eq(stop).all()
    first = (whole[1, 4:] == stop).nonzero()
    assert found.shape[1] == (whole.shape[1] if not len(first) else max(6, 5 + int(first[0])))


def test_bad_requests(model: Llama, engine: Engine, prompt: Tensor) -> None:
    plain = bw.compile(model, passes=[], example_inputs=(prompt,), backend="eager")
    with pytest.raises(OptionError, match="keeps its keys and values"):
        bw.generate(plain, prompt, new_tokens=1)
    with pytest.raises(OptionError, match="new_tokens=0"):
        bw.generate(engine, prompt, new_tokens=0)
    with pytest.raises(OptionError, match=r"top_p=1.5"):
        bw.generate(engine, prompt, new_tokens=1, top_p=1.5)
    with pytest.raises(OptionError, match="room for 24 tokens"):
        bw.generate(engine, prompt, new_tokens=40)
