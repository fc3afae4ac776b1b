"""PPCL: what teaching one block to stand for several is worth on the deep GPT."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.models.qwen_image import QWEN_IMAGE, QwenImage
from blockwright.passes import (
    DropBlocks,
    DropIdleFeatures,
    LinearizeStreams,
    LinearizeSublayers,
    PruneContiguous,
)
from blockwright.passes.shared.probes import probe
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
INTERVALS = (1, 2), (4, 5)
MORE = (1, 2), (3, 4), (5, 6)
SETS, STEPS = 64, 250


@pytest.fixture(scope="module")
def deep(toy_deep_gpt: Toy) -> Program:
    return bw.capture(toy_deep_gpt.model, toy_deep_gpt.example_inputs)


@pytest.fixture(scope="module")
def sets(toy_deep_gpt: Toy) -> list[list[Tensor]]:
    return [list(inputs) for inputs in toy_deep_gpt.calibration(SETS)]


def loss(toy: Toy, program: Program) -> float:
    """Bits per character of a program."""
    module = program.module()
    return toy.quality(lambda *inputs: module(*inputs)[0])["bits_per_character"]


def pruned(program: Program, sets: list[list[Tensor]], **options: Any) -> Program:
    recover = bw.Recover(steps=STEPS)
    new, _ = run_passes(
        program, [PruneContiguous(rate=1e-3, **options)], calibration=sets, recover=recover
    )
    return new


def dropped(program: Program, blocks: tuple[int, ...]) -> Program:
    new, _ = run_passes(program, [DropBlocks(blocks=blocks)])
    return new


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_probes(deep: Program, sets: list[list[Tensor]], acceptance: Acceptance) -> None:
    (stack,) = deep.stacks()
    errors = [error for (error,) in probe(stack, sets[:8]).errors]
    acceptance(
        "ppcl",
        1,
        "A linear probe is nearer to what a block adds than the identity map is, for every block.",
        naive="identity, relative error 1",
        figure=f"relative errors {', '.join(f'{error:.2f}' for error in errors)}",
        holds=max(errors) < 1,
    )
    assert max(errors) < 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("intervals", "gone"), [(INTERVALS, (2, 5)), (MORE, (2, 4, 6))])
def test_distillation(
    toy_deep_gpt: Toy,
    deep: Program,
    sets: list[list[Tensor]],
    acceptance: Acceptance,
    intervals: tuple[tuple[int, int], ...],
    gone: tuple[int, ...],
) -> None:
    dense, drop = loss(toy_deep_gpt, deep), loss(toy_deep_gpt, dropped(deep, gone))
    alone = loss(toy_deep_gpt, pruned(deep, sets, intervals=intervals))
    chained = loss(toy_deep_gpt, pruned(deep, sets, intervals=intervals, sequential=True))
    plain = loss(toy_deep_gpt, pruned(deep, sets, intervals=intervals, distance="mse"))
    saved = (drop - alone) / (drop - dense)
    what = f"{len(gone)} of 8 blocks"
    acceptance(
        "ppcl",
        2,
        f"Taught students win back more than half of what dropping {what} costs.",
        naive="drop the same blocks",
        figure=f"{alone:.3f} against {drop:.3f} bits (whole: {dense:.3f}), {saved:.0%} won back",
        holds=saved > 0.5,
    )
    acceptance(
        "ppcl",
        2,
        f"Students taught one by one lose less than students in a row, without {what}.",
        naive="sequential, same steps",
        figure=f"{alone:.3f} against {chained:.3f} bits",
        holds=alone < chained,
    )
    acceptance(
        "ppcl",
        2,
        f"Comparing directions loses less than comparing values, without {what}.",
        naive="mean squared error, same steps",
        figure=f"{alone:.3f} against {plain:.3f} bits",
        holds=alone < plain,
    )
    assert dense < alone < drop


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, 3])
def test_detected_intervals(
    toy_deep_gpt: Toy, deep: Program, sets: list[list[Tensor]], acceptance: Acceptance, count: int
) -> None:
    pass_ = PruneContiguous(keep_ratio=1 - count / 8)
    found, (step,) = run_passes(deep, [pass_], calibration=sets[:8], recover=False)
    labels = [block.label for block in deep.blocks()]
    chosen = sorted(labels.index(label) for label in step.receipt.changed)
    apart = [s for s in _subsets(count) if all(b - a > 1 for a, b in pairwise(s))]
    others = [loss(toy_deep_gpt, dropped(deep, blocks)) for blocks in apart]
    ours = loss(toy_deep_gpt, found)
    acceptance(
        "ppcl",
        3,
        f"Without training, giving up the {count} blocks the detector names costs less than blocks"
        " that are not neighbours do on average.",
        naive=f"{len(apart)} random sets of {count} of the blocks 1 to 7, none next to another",
        figure=f"{ours:.3f} (blocks {chosen}) against {mean(others):.3f} bits",
        holds=ours <= mean(others),
    )
    assert len(chosen) == count


def _subsets(count: int) -> list[tuple[int, ...]]:
    draw = random.Random(0)
    return sorted({tuple(sorted(draw.sample(range(1, 8), count))) for _ in range(40)})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tables(
    toy_deep_gpt: Toy,
    deep: Program,
    sets: list[list[Tensor]],
    acceptance: Acceptance,
    tmp_path: Path,
) -> None:
    options = {"calibration": [tuple(s) for s in sets], "backend": "eager"}
    engine = bw.compile(
        deep, PruneContiguous(intervals=MORE), recover=bw.Recover(steps=STEPS), **options
    )
    engine.save(tmp_path / "students.bw")
    taken = bw.Recover(weights=tmp_path / "students.bw")
    losses = [
        loss(
            toy_deep_gpt,
            bw.compile(
                deep,
                PruneContiguous(intervals=MORE[:count], allow_no_match=True),
                recover=taken,
                **options,
            ).program,
        )
        for count in range(4)
    ]
    acceptance(
        "ppcl",
        4,
        "With every interval that is given back its blocks the loss falls, without training.",
        naive="none: 0, 1, 2 and 3 students",
        figure=f"{', '.join(f'{value:.3f}' for value in losses)} bits",
        holds=losses == sorted(losses),
    )
    assert losses[0] == loss(toy_deep_gpt, deep)
    assert losses[0] < losses[3]


DEPTH = (
    (3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49),
    (52, 53), (54, 55), (56, 57),
)  # fmt: skip
"""Intervals of Qwen-Image as in the released code."""

GROUPS = ("blocks.36", "blocks.37"), ("blocks.40", "blocks.41"), ("blocks.50", "blocks.59")
NETWORKS = "blocks.2.*", "blocks.58.image*", "blocks.59.image*"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_qwen_image_at_its_size(acceptance: Acceptance) -> None:
    """Parameters of the released models, whose files also hold weights that nothing reads.

    In a group, attention still gives the 8 blocks behind the first something for the text, which
    is thrown away with the layer behind it. The last group reaches to the end, where nobody reads
    the text: neither the map that restores it nor what block 50 does to it after its attention.
    """
    with torch.device("meta"):
        model = QwenImage(QWEN_IMAGE).eval()
        whole = bw.capture(model, model.example_inputs())
    dim, ffn_dim = QWEN_IMAGE.dim, QWEN_IMAGE.ffn_dim
    layer, network = dim * dim + dim, 2 * dim * ffn_dim + ffn_dim + dim
    unread = 8 * layer + layer + (layer + network)
    programs = [whole]
    for pass_ in (
        PruneContiguous(intervals=DEPTH),
        LinearizeSublayers(include=NETWORKS, keep_ratio=0.0),
        DropIdleFeatures(),
        LinearizeStreams(groups=GROUPS),
    ):
        programs.append(run_passes(programs[-1], [pass_])[0])
    counts = [program.cost().parameters for program in programs]
    networks = counts[1] - counts[3]
    found = {
        "depth": (11_934_618_688, counts[1]),
        "depth and text groups": (10_981_226_560, counts[4] + networks + unread),
        "depth, text groups and networks": (10_603_653_184, counts[4] + unread),
    }
    for what, (released, ours) in found.items():
        acceptance(
            "ppcl",
            5,
            f"Qwen-Image without {what} has {released:,} of 20,430,401,088 parameters.",
            naive="the released files",
            figure=f"{ours:,}"
            + (
                f", of which {unread:,} are read by nothing and gone here" if "text" in what else ""
            ),
            holds=released == ours,
        )
        assert released == ours
    assert counts[0] == 20_430_401_088
