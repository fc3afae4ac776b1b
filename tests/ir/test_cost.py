"""Costs counted by hand on a model small enough to do so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import QuantizeWeights

DIM, FFN, VOCAB, SEQ, DEPTH = 8, 12, 32, 8, 3


def linear_flops(batch: int) -> int:
    per_token = 4 * DIM * DIM + 2 * DIM * FFN
    return 2 * batch * SEQ * (DEPTH * per_token + DIM * VOCAB)


@pytest.mark.parametrize("batch", [2, 5])
def test_flops_by_kind(program: Program, batch: int) -> None:
    cost = program.cost({"batch": batch})
    assert cost.by_kind["linear"] == linear_flops(batch)
    assert cost.by_kind["attention"] == DEPTH * 4 * batch * SEQ * SEQ * DIM
    assert cost.flops == sum(cost.by_kind.values()) == sum(cost.by_path.values())


def test_paths_add_up_per_block(program: Program) -> None:
    paths = program.cost().by_path
    assert paths["blocks.0.up"] == paths["blocks.2.up"] == 2 * 2 * SEQ * DIM * FFN


def test_parameters_count_ties_once(gpt: nn.Module, program: Program) -> None:
    assert program.cost().parameters == sum(p.numel() for p in gpt.parameters())
    assert program.cost().weight_bytes == 4 * program.cost().parameters


def test_quantized_weights_still_count(program: Program) -> None:
    before = program.cost()
    after = run_passes(program, [QuantizeWeights(bits=4, group_size=4)])[0].cost()
    assert after.parameters == before.parameters
    assert after.by_kind["linear"] == before.by_kind["linear"]
    assert after.weight_bytes < before.weight_bytes


def test_a_large_model_needs_no_weights() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig()).eval()
    program = capture(model, (torch.zeros(1, 16, dtype=torch.int64, device="meta"),))
    assert program.cost().parameters == 124_439_808  # GPT-2 small as published


def test_convolutions_are_counted() -> None:
    program = capture(nn.Conv2d(3, 4, 2), (torch.zeros(1, 3, 5, 5),))
    assert program.cost().by_kind["convolution"] == 2 * 4 * 4 * math.prod((4, 3, 2, 2))
