"""Toys: data, loop, cache and figures of quality in seconds; the full trainings are slow tests."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

import blockwright as bw
from blockwright.testing import toys
from blockwright.testing.toys import (
    cache,
    data,
    diffusion,
    drawing,
    flow,
    language,
    masked,
    painting,
    scores,
    training,
    vision,
)

PLAN = training.Plan(steps=30, batch=8, rate=0.1)
Train = Callable[[], nn.Module]


def line() -> nn.Module:
    return nn.Linear(3, 1)


def line_loss(model: nn.Module, generator: Generator) -> Tensor:
    x = torch.randn((PLAN.batch, 3), generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Data


def test_text_is_ascii_and_its_validation_part_is_new() -> None:
    text = data.text()
    both = torch.cat((text.train, text.validation))
    assert len(both) > 300_000
    assert int(both.min()) >= 10
    assert int(both.max()) < data.VOCAB
    pages = [bytes(part.tolist()).decode().split("\n\n") for part in (text.train, text.validation)]
    assert len(pages[1]) > 100
    assert not {p for p in pages[0] if len(p) > 40} & {p for p in pages[1] if len(p) > 40}


def test_encode_keeps_ascii_and_replaces_the_rest() -> None:
    assert bytes(data.encode("a “b” ß\n").tolist()) == b'a "b" ?\n'


def test_windows_are_whole_batches_and_do_not_overlap() -> None:
    assert data.windows(torch.arange(23), 3, 2).tolist() == torch.arange(18).view(6, 3).tolist()


def test_digits_are_balanced_and_split_once() -> None:
    images, held = data.digits()
    assert (len(images), len(held)) == (1437, 360)
    assert images.images.shape[1:] == (1, 8, 8)
    assert (float(images.images.min()), float(images.images.max())) == (-1, 1)
    counts = held.labels.bincount()
    assert len(counts) == 10
    assert int(counts.min()) >= 34
    assert torch.equal(data.digits()[1].images, held.images)


def test_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(bw.BlockwrightError, match=r'pip install "blockwright\[testing\]"'):
        data.digits()


# The loop


def test_training_finds_the_weights() -> None:
    model = training.train(line, line_loss, dataclasses.replace(PLAN, weight_decay=0.0), "line")
    assert not model.training
    assert line_loss(model, Generator()).item() < 0.1


def test_training_repeats_bit_for_bit_and_the_seed_matters() -> None:
    text, plan = data.text(), training.Plan(steps=3, batch=2, rate=1e-3)
    build = partial(language.build_gpt, language.GPT_CONFIG)
    loss = training.task_loss(language.next_characters(text.train), plan.batch)
    first, again = (training.train(build, loss, plan, "gpt") for _ in range(2))
    other = training.train(build, loss, dataclasses.replace(plan, seed=1), "gpt")
    assert same(first, again)
    assert not same(first, other)


def test_training_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    training.train(line, line_loss, PLAN, "line")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    plan = training.Plan(steps=100, batch=1, rate=1.0, warm_up=0.1)
    paces = [training.pace(step, plan) for step in range(101)]
    assert paces[0] == pytest.approx(0.1)
    assert paces[10] == max(paces) == 1
    assert paces[55] == pytest.approx(0.5)
    assert paces[100] == 0
    assert paces[10:] == sorted(paces[10:], reverse=True)


# The cache


class Counted:
    """Trains a line and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return training.train(line, line_loss, dataclasses.replace(PLAN, steps=2), "line")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKWRIGHT_CACHE", str(tmp_path))
    return tmp_path


def stored_files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_model_is_trained_once(home: Path) -> None:
    train = Counted()
    first, again = (cache.trained("line", line, train, PLAN) for _ in range(2))
    assert train.calls == 1
    assert same(first, again)
    assert first is not again
    assert not again.training
    assert [path.name for path in stored_files(home)] == ["weights.safetensors"]


@pytest.mark.parametrize("other", [(dataclasses.replace(PLAN, seed=7),), (PLAN, training)])
def test_whatever_weights_depend_on_counts(home: Path, other: tuple[object, ...]) -> None:
    train = Counted()
    cache.trained("line", line, train, PLAN)
    cache.trained("line", line, train, *other)
    assert train.calls == 2
    assert len(stored_files(home)) == 2


def cut(content: bytes) -> bytes:
    return content[:-1]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_trained_anew(home: Path, damage: Callable[[bytes], bytes]) -> None:
    train = Counted()
    first = cache.trained("line", line, train)
    (path,) = stored_files(home)
    path.write_bytes(damage(path.read_bytes()))
    assert same(cache.trained("line", line, train), first)
    assert train.calls == 2
    assert same(cache.trained("line", line, train), first)
    assert train.calls == 2


def test_an_interrupted_training_leaves_nothing(home: Path) -> None:
    def interrupted() -> nn.Module:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.trained("line", line, interrupted)
    assert stored_files(home) == []
    assert cache.trained("line", line, Counted()) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no lock on folders there")
def test_those_who_come_together_train_once(home: Path) -> None:
    train = Counted()
    with ThreadPoolExecutor(4) as pool:
        models = [pool.submit(cache.trained, "line", line, train) for _ in range(4)]
    assert train.calls == 1
    assert all(same(model.result(), models[0].result()) for model in models)


def test_the_cache_lies_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCKWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "blockwright"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.home() == Path.home() / ".cache" / "blockwright"
    monkeypatch.setenv("BLOCKWRIGHT_CACHE", str(tmp_path / "mine"))
    assert cache.home() == tmp_path / "mine"


# Figures of quality


def test_a_uniform_model_takes_log2_of_vocab_bits() -> None:
    windows = torch.randint(data.VOCAB, (4, 9))
    bits = scores.bits_per_character(lambda x: torch.zeros(*x.shape, data.VOCAB), windows, 2)
    assert bits == pytest.approx(math.log2(data.VOCAB))


def test_a_model_that_knows_the_next_character_takes_no_bits() -> None:
    windows = torch.arange(40).view(4, 10)
    knows = lambda x: 100.0 * nn.functional.one_hot(x + 1, data.VOCAB)  # noqa: E731
    assert scores.bits_per_character(knows, windows, 2) == pytest.approx(0, abs=1e-6)


def test_accuracy_counts_right_answers() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    assert scores.accuracy(torch.eye(3)[labels], labels) == 1
    assert scores.accuracy(torch.eye(3)[[0, 1, 2, 0]], labels) == 0.75


def test_frechet_distance_of_known_distributions() -> None:
    x = torch.randn(500, 4, generator=Generator().manual_seed(0)).double()
    assert scores.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert scores.frechet_distance(x, x + 3) == pytest.approx(4 * 9)
    centred = x - x.mean(0)
    spread = centred.T.cov().trace().item()  # sqrt(C * 9C) = 3C, so tr(C + 9C - 6C)
    assert scores.frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread)


def test_predicting_no_noise_has_loss_one() -> None:
    _, held = data.digits()
    silent = lambda x, times, labels: torch.zeros(len(x), 2, 8, 8)  # noqa: E731
    assert diffusion.denoising_loss(silent, held, 40) == pytest.approx(1, abs=0.02)


class Oracle:
    """Knows the only image there is, so it knows the noise."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.calls = image, 0

    def __call__(self, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        kept = diffusion.kept_signal(times.long())
        noise = (noisy - kept.sqrt() * self.image) / (1 - kept).sqrt()
        return torch.cat((noise, torch.zeros_like(noise)), dim=1)


def test_sampling_with_an_oracle_ends_at_the_image() -> None:
    image = torch.linspace(-1, 1, 64).view(1, 8, 8)
    oracle = Oracle(image)
    drawn = toys.sample(oracle, torch.arange(6), steps=5, guidance=2.0, batch=3)
    assert torch.allclose(drawn, image.expand(6, 1, 8, 8), atol=1e-3)
    assert oracle.calls == 2 * 5 * 2  # batches, steps, with and without label
    toys.sample(oracle, torch.arange(3), steps=5, guidance=1.0, batch=3)
    assert oracle.calls == 20 + 5


def test_an_oracle_has_no_denoising_loss() -> None:
    image = torch.linspace(-1, 1, 64).view(1, 8, 8)
    only = data.Images(image.expand(40, 1, 8, 8), torch.zeros(40, dtype=torch.long))
    assert diffusion.denoising_loss(Oracle(image), only, 40) == pytest.approx(0, abs=1e-6)


def test_steps_of_sampling_are_checked() -> None:
    with pytest.raises(bw.BlockwrightError, match="steps=0"):
        toys.sample(Oracle(torch.zeros(1, 8, 8)), torch.arange(3), steps=0)


# Flow matching


def test_patches_are_pieces_of_the_image() -> None:
    images = torch.arange(128.0).view(2, 1, 8, 8)
    cut_up = flow.patches(images)
    assert cut_up.shape == (2, 16, 4)
    assert cut_up[0, 5].tolist() == [18, 19, 26, 27]  # second row of patches, second column
    assert torch.equal(flow.images_of(cut_up), images)


def test_names_are_spelled_in_letters() -> None:
    tokens = flow.name_tokens(torch.tensor([8, 2, 10]))
    assert tokens.sum(-1).eq(1).all()
    assert bytes((tokens.argmax(-1) + ord("a")).flatten().tolist()) == b"eighttwo{{{{{{{"
    *_, pooled, _, _ = flow.inputs(torch.zeros(3, 16, 4), torch.zeros(3), torch.tensor([8, 2, 10]))
    assert pooled.flatten().tolist() == pytest.approx([1, 0.6, 0])


class FlowOracle:
    """Knows the only image there is, so it knows where to go."""

    def __init__(self, image: Tensor) -> None:
        self.image = flow.patches(image[None, None])

    def __call__(
        self, noisy: Tensor, text: Tensor, pooled: Tensor, times: Tensor, *_: Tensor
    ) -> Tensor:
        return (noisy - self.image) / times[:, None, None].clamp(min=1e-6)


def test_following_an_oracle_ends_at_the_image() -> None:
    image = torch.linspace(-1, 1, 64).view(8, 8)
    drawn = flow.flow_sample(FlowOracle(image), torch.arange(6), steps=5, batch=3)
    assert torch.allclose(drawn, image.expand(6, 1, 8, 8), atol=1e-3)


def test_predicting_no_velocity_has_the_loss_of_noise_and_images() -> None:
    _, held = data.digits()
    silent = lambda noisy, *_: torch.zeros_like(noisy)  # noqa: E731
    expected = 1 + held.images.square().mean().item()
    assert flow.velocity_loss(silent, held, 40) == pytest.approx(expected, abs=0.02)


# Short trainings of the real thing


@pytest.fixture
def short(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps each, and a fraction of the data to validate with."""
    for module in (language, masked, vision, drawing, painting):
        monkeypatch.setattr(module, "PLAN", dataclasses.replace(module.PLAN, steps=2))
    monkeypatch.setattr(language, "DEEP_PLAN", language.PLAN)
    monkeypatch.setattr(drawing, "sample", partial(toys.sample, steps=2))
    monkeypatch.setattr(flow, "flow_sample", partial(flow.flow_sample, steps=2))
    text, (images, held) = data.text(), data.digits()
    piece = data.Text(text.train, text.validation[:3000])
    few = data.Images(held.images[:80], held.labels[:80])
    monkeypatch.setattr(data, "text", lambda: piece)
    monkeypatch.setattr(data, "digits", lambda: (images, few))


TOYS = {
    toys.gpt: {"bits_per_character"},
    toys.deep_gpt: {"bits_per_character"},
    toys.llama: {"bits_per_character"},
    toys.bert: {"bits_per_blank"},
    toys.vit: {"accuracy", "cross_entropy"},
    toys.dit: {"denoising_loss", "class_consistency", "feature_distance"},
    toys.flux: {"velocity_loss", "class_consistency", "feature_distance"},
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("make", TOYS, ids=lambda make: make.__name__)
def test_a_toy_is_whole(make: Callable[[], toys.Toy]) -> None:
    toy, again = make(), make()
    assert not toy.model.training
    assert same(toy.model, again.model)
    figures = toy.quality()
    assert set(figures) == TOYS[make]
    assert all(math.isfinite(figure) for figure in figures.values())
    shapes = set()

    def spy(*inputs: Tensor) -> object:
        shapes.add(tuple(x.shape for x in inputs))
        return again.model(*inputs)

    assert toy.quality(spy) == figures
    assert shapes == {tuple(x.shape for x in toy.example_inputs)}

    assert_feeds_methods(toy)


def assert_feeds_methods(toy: toys.Toy) -> None:
    """Its calibration is training data of the right shape, and its loss has a gradient."""
    batches, judged = toy.calibration(2), toy.judged(2)
    example = [(x.shape, x.dtype) for x in toy.example_inputs]
    assert all([(x.shape, x.dtype) for x in batch] == example for batch in batches)
    assert not torch.equal(batches[0][0], batches[1][0])
    for batch, (inputs, target) in zip(batches, judged, strict=True):
        assert all(map(torch.equal, batch, inputs))
        losses = toy.task.loss(toy.model(*inputs), target)
        assert losses.shape == (len(toy.example_inputs[0]),)
        losses.mean().backward()
    assert sum(p.grad is not None for p in toy.model.parameters()) > 20
    assert not torch.equal(toy.calibration(1, seed=1)[0][0], batches[0][0])


@pytest.mark.usefixtures("short")
def test_a_toy_compiles_with_its_own_calibration() -> None:
    toy = toys.vit()
    engine = bw.compile(
        toy.model,
        [bw.QuantizeWeights(bits=8)],
        toy.example_inputs,
        calibration=toy.calibration(2),
        backend="eager",
    )
    assert toy.quality(engine) == pytest.approx(toy.quality(), rel=0.05)


# The full trainings


@pytest.mark.slow
def test_gpt_has_learned(toy_gpt: toys.Toy) -> None:
    assert toy_gpt.quality()["bits_per_character"] < 2.7


@pytest.mark.slow
def test_deep_gpt_has_learned(toy_deep_gpt: toys.Toy) -> None:
    assert toy_deep_gpt.quality()["bits_per_character"] < 2.9


@pytest.mark.slow
def test_llama_has_learned(toy_llama: toys.Toy) -> None:
    assert toy_llama.quality()["bits_per_character"] < 2.2


@pytest.mark.slow
def test_bert_has_learned(toy_bert: toys.Toy) -> None:
    assert toy_bert.quality()["bits_per_blank"] < 4.45  # frequencies alone take 4.68


@pytest.mark.slow
def test_vit_has_learned(toy_vit: toys.Toy) -> None:
    assert toy_vit.quality()["accuracy"] > 0.96


@pytest.mark.slow
def test_dit_has_learned(toy_dit: toys.Toy, toy_vit: toys.Toy) -> None:
    figures = toy_dit.quality()
    assert figures["denoising_loss"] < 0.11
    assert figures["class_consistency"] > 0.9
    assert figures["feature_distance"] < 2


@pytest.mark.slow
def test_flux_has_learned(toy_flux: toys.Toy) -> None:
    figures = toy_flux.quality()
    assert figures["velocity_loss"] < 0.45
    assert figures["class_consistency"] > 0.9
    assert figures["feature_distance"] < 2


@pytest.mark.slow
def test_a_compiled_toy_is_scored_like_the_model(toy_gpt: toys.Toy) -> None:
    inputs = toy_gpt.example_inputs
    engine = bw.compile(toy_gpt.model, [bw.QuantizeWeights()], inputs, backend="eager")
    before, after = toy_gpt.quality(), toy_gpt.quality(engine)
    assert after != before
    assert after["bits_per_character"] < before["bits_per_character"] + 0.02
