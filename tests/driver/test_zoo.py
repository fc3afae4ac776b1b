"""Presets: names, sizes, and costs that agree with closed formulas."""

from __future__ import annotations

import functools

import pytest
import torch

from blockwright.driver.zoo import DRAWN_LIMIT, PRESETS, Preset, find_preset, near_presets
from blockwright.ir.capture import capture
from blockwright.ir.cost import Cost
from blockwright.ir.errors import OptionError


@functools.cache
def cost(name: str) -> Cost:
    preset = find_preset(name)
    assert preset is not None
    model = preset.sketch()
    with torch.device("meta"):
        inputs = preset.example_inputs(model)
    return capture(model, inputs).cost()


def multiply_adds(found: Cost) -> dict[str, float]:
    """Two FLOPs are one multiply-add; what is neither product nor convolution is left out."""
    return {kind: flops / 2 for kind, flops in found.by_kind.items() if kind != "elementwise"}


def test_names_are_found_whatever_their_case_and_punctuation() -> None:
    names = [preset.name for preset in PRESETS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)
    assert all(find_preset(name) is preset for name, preset in zip(names, PRESETS, strict=True))
    for text in ("FLUX.1-dev", "flux-1-dev", "Flux1Dev"):
        found = find_preset(text)
        assert found is not None
        assert found.name == "flux.1-dev"
    assert find_preset("flux") is None
    assert find_preset("") is None


def test_unknown_names_bring_near_ones() -> None:
    assert near_presets("flux.1-dve")[0] == "flux.1-dev"
    assert near_presets("lama-2-7b")[0] == "llama-2-7b"
    assert near_presets("nothing at all") == []


def test_sketches_hold_no_memory_and_drawn_weights_are_repeatable() -> None:
    preset = find_preset("vit-ti/16")
    assert preset is not None
    assert {p.device.type for p in preset.sketch().parameters()} == {"meta"}
    state = torch.random.get_rng_state()
    one, again, other = (list(preset.draw(seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_drawn_weights_leave_no_matrix_at_zero() -> None:
    found = find_preset("dit-s/2")
    assert found is not None
    assert all(p.any() for p in found.draw().parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", ["flux.1-dev", "llama-2-7b", "wan2.1-1.3b"])
def test_large_presets_are_not_drawn(name: str) -> None:
    preset = find_preset(name)
    assert preset is not None
    assert preset.parameters > DRAWN_LIMIT
    with pytest.raises(OptionError, match=r"random weights are drawn for 1\.0 G at most"):
        preset.draw()


# Cost of one call in multiply-adds, from sizes alone. n image, video or word tokens, w words of a
# text, d width, f hidden neurons; a dense block costs 4 d² per token for projections and 2 n d for
# logits and values.


def gpt2() -> tuple[int, int, int]:
    n, d, depth = 1024, 768, 12
    return n * (depth * 12 * d**2 + 50257 * d), depth * 2 * n**2 * d, 0


def llama_2() -> tuple[int, int, int]:
    n, d, f, depth = 4096, 4096, 11008, 32
    return n * (depth * (4 * d**2 + 3 * d * f) + 32000 * d), depth * 2 * n**2 * d, 0


def llama_3_1() -> tuple[int, int, int]:
    n, d, f, depth, kv = 4096, 4096, 14336, 32, 8 * 128
    block = 2 * d**2 + 2 * d * kv + 3 * d * f
    return n * (depth * block + 128256 * d), depth * 2 * n**2 * d, 0


def qwen3_0_6b() -> tuple[int, int, int]:
    n, d, f, depth, q, kv = 4096, 1024, 3072, 28, 16 * 128, 8 * 128
    block = 2 * d * q + 2 * d * kv + 3 * d * f
    return n * (depth * block + 151936 * d), depth * 2 * n**2 * q, 0


def bert_base() -> tuple[int, int, int]:
    n, d, depth = 512, 768, 12
    return n * depth * 12 * d**2 + d**2, depth * 2 * n**2 * d, 0


def vit(d: int) -> tuple[int, int, int]:
    n, depth = 197, 12
    return n * depth * 12 * d**2 + 1000 * d, depth * 2 * n**2 * d, 196 * 3 * 16**2 * d


def dit(d: int, depth: int) -> tuple[int, int, int]:
    n = 256
    outside = 256 * d + d**2 + 2 * d**2 + n * d * 32  # time, final modulation, head
    return depth * (n * 12 * d**2 + 6 * d**2) + outside, depth * 2 * n**2 * d, n * 16 * d


def pixart() -> tuple[int, int, int]:
    n, w, d, depth = 4096, 120, 1152, 28
    block = n * 12 * d**2 + 2 * (n + w) * d**2
    sizes = 3 * (256 * (d // 3) + (d // 3) ** 2)  # height, width, aspect
    outside = w * (4096 * d + d**2) + 256 * d + d**2 + sizes + 6 * d**2 + n * d * 32
    return depth * block + outside, depth * (2 * n**2 * d + 2 * n * w * d), n * 16 * d


def flux() -> tuple[int, int, int]:
    n, image, w, d = 4608, 4096, 512, 3072
    double, single = n * 12 * d**2 + 2 * 6 * d**2, n * 12 * d**2 + 3 * d**2
    conditions = 2 * (256 * d + d**2) + 768 * d + d**2
    outside = image * 64 * d + w * 4096 * d + conditions + 2 * d**2 + image * d * 64
    return 19 * double + 38 * single + outside, 57 * 2 * n**2 * d, 0


def sd3() -> tuple[int, int, int]:
    n, w, d, depth = 4096, 154, 1536, 24
    image, text = n * 12 * d**2 + 6 * d**2, w * 12 * d**2 + 6 * d**2
    last_text = w * 3 * d**2 + 2 * d**2  # keys, values and queries only
    outside = w * 4096 * d + 256 * d + d**2 + 2048 * d + d**2 + 2 * d**2 + n * d * 64
    linear = depth * image + (depth - 1) * text + last_text + outside
    return linear, depth * 2 * (n + w) ** 2 * d, n * 64 * d


def qwen_image() -> tuple[int, int, int]:
    n, w, d, depth = 4096, 512, 3072, 60
    block = (n + w) * 12 * d**2 + 2 * 6 * d**2
    outside = 2 * n * 64 * d + w * 3584 * d + 256 * d + d**2 + 2 * d**2
    return depth * block + outside, depth * 2 * (n + w) ** 2 * d, 0


def wan(d: int, f: int, depth: int) -> tuple[int, int, int]:
    n, w = 21 * 30 * 52, 512
    block = n * (4 * d**2 + 2 * d * f) + 2 * (n + w) * d**2
    outside = w * (4096 * d + d**2) + 256 * d + d**2 + 6 * d**2 + n * d * 64
    return depth * block + outside, depth * (2 * n**2 * d + 2 * n * w * d), n * 64 * d


FORMULAS = {
    "gpt2": gpt2(),
    "llama-2-7b": llama_2(),
    "llama-3.1-8b": llama_3_1(),
    "qwen3-0.6b": qwen3_0_6b(),
    "bert-base": bert_base(),
    "vit-b/16": vit(768),
    "deit-s/16": vit(384),
    "dit-s/2": dit(384, 12),
    "dit-xl/2": dit(1152, 28),
    "pixart-alpha": pixart(),
    "flux.1-dev": flux(),
    "sd3-medium": sd3(),
    "qwen-image": qwen_image(),
    "wan2.1-1.3b": wan(1536, 8960, 30),
    "wan2.1-14b": wan(5120, 13824, 40),
}


QUICK = {
    "gpt2",
    "llama-3.1-8b",
    "dit-s/2",
    "pixart-alpha",
    "flux.1-dev",
    "qwen-image",
    "wan2.1-14b",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FORMULAS]
)
def test_costs_are_those_of_the_closed_formula(name: str) -> None:
    found = multiply_adds(cost(name))
    kinds = ("linear", "attention", "convolution")
    expected = {kind: n for kind, n in zip(kinds, FORMULAS[name], strict=True) if n}
    assert found == expected


PUBLISHED = {
    "vit-b/16": 17.56e9,
    "deit-s/16": 4.60e9,
    "dit-s/2": 6.05e9,
    "dit-xl/2": 118.6e9,
    "flux.1-dev": 37.2e12,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formulas_give_the_published_figures(name: str) -> None:
    assert sum(FORMULAS[name]) == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_layers_of_the_last_block_are_counted_too() -> None:
    by_path = cost("wan2.1-14b").by_path
    n, w, d, f = 32760, 512, 5120, 13824
    assert by_path["blocks.39.down"] == 2 * n * d * f
    assert by_path["blocks.39.cross_attention.key"] == 2 * w * d**2


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_is_captured_without_memory(preset: Preset) -> None:
    found = cost(preset.name)
    assert found.parameters == preset.parameters
    assert found.flops > found.parameters
