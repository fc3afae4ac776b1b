"""FuseBlocks on a trained decoder of eight blocks, and on Llama at its real sizes.

The settings are those of the published code where size allows: eight sets of eight sequences, 20
epochs, groups of four, rank 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from blockwright.driver.manager import Step, run_passes
from blockwright.driver.student import Student
from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.models.llama import LLAMA_2_7B, LLAMA_3_1_8B, Llama, LlamaConfig
from blockwright.passes import DropBlocks, FuseBlocks
from blockwright.passes.shared.grafts import GraftedMatrix
from blockwright.passes.shared.influence import macro_influence

if TYPE_CHECKING:
    from blockwright.testing.acceptance import Acceptance
    from blockwright.testing.toys import Toy

pytestmark = pytest.mark.acceptance
METHOD = "fusegpt"
OPTIONS: dict[str, Any] = {"keep_ratio": 0.75, "group": 4, "rank": 8}
Sets = list[list[Tensor]]
Fused = Callable[..., tuple[Program, Step]]


@pytest.fixture(scope="module")
def dense(toy_deep_gpt: Toy) -> Program:
    return capture(toy_deep_gpt.model, toy_deep_gpt.example_inputs)


@pytest.fixture(scope="module")
def sets(toy_deep_gpt: Toy) -> Sets:
    return [list(inputs) for inputs in toy_deep_gpt.calibration(8)]


@pytest.fixture(scope="module")
def bits(toy_deep_gpt: Toy) -> Callable[[Program], float]:
    """Bits per character of a program; perplexity is two to that power."""

    def measure(program: Program) -> float:
        module = program.module()
        return toy_deep_gpt.quality(lambda tokens: module(tokens)[0])["bits_per_character"]

    return measure


@pytest.fixture(scope="module")
def fused(dense: Program, sets: Sets) -> Fused:
    """Two of eight blocks fused, trained once per setting."""
    known: dict[str, tuple[Program, Step]] = {}

    def fuse(**options: Any) -> tuple[Program, Step]:
        pass_ = FuseBlocks(**{**OPTIONS, **options})
        if str(pass_) not in known:
            new, (step,) = run_passes(dense, [pass_], calibration=sets)
            known[str(pass_)] = new, step
        return known[str(pass_)]

    return fuse


def without(program: Program, labels: list[str]) -> Program:
    """Return a program without some blocks, untrained."""
    every = [block.label for block in program.blocks()]
    drop = DropBlocks(blocks=tuple(every.index(label) for label in labels))
    return run_passes(program, [drop])[0]


@pytest.mark.slow
def test_fusing_beats_removing(
    dense: Program, sets: Sets, bits: Callable[[Program], float], fused: Fused,
    acceptance: Acceptance,
) -> None:  # fmt: skip
    new, step = fused()
    removed = without(dense, list(step.plan.decisions))
    ours, theirs, whole = bits(new), bits(removed), bits(dense)
    acceptance(
        METHOD, 1, "A fused model is better than the one whose blocks were removed.",
        naive="remove the same two of eight blocks",
        figure=f"{ours:.3f} against {theirs:.3f} bits per character ({whole:.3f} with all blocks)",
        holds=ours < theirs,
    )  # fmt: skip
    assert ours < theirs


@pytest.mark.slow
def test_an_untrained_graft_is_plain_removal(
    dense: Program, sets: Sets, fused: Fused, acceptance: Acceptance
) -> None:
    _, step = fused()
    (first, *_) = step.plan.decisions
    pass_ = FuseBlocks(blocks=(first,), group=4, rank=8)
    plan = pass_.plan(dense)
    blocks = [b for b in dense.blocks() if b.label == first]
    spliced = rewrite(dense, [(b, pass_.replace(b, plan.decisions[first])) for b in blocks], by="t")
    (stage,) = pass_.recovery(dense, spliced, plan)
    grafted = spliced.with_(tensors={**spliced.tensors, **Student(spliced, stage).tensors()})
    (ours,), (theirs,) = run(grafted, sets[0]), run(without(dense, [first]), sets[0])
    acceptance(
        METHOD, 1, "Before training, a graft is plain removal, bit by bit.",
        naive="remove the same block",
        figure=f"largest difference of logits {float((ours - theirs).abs().max()):.1g}",
        holds=torch.equal(ours, theirs),
    )  # fmt: skip
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_macro_influence_finds_what_matters(
    dense: Program, sets: Sets, bits: Callable[[Program], float], acceptance: Acceptance
) -> None:
    (stack,) = dense.stacks()
    influence = list(macro_influence(dense, stack, sets[:4]).values())
    losses = [bits(without(dense, [block.label])) for block in stack.blocks]
    chosen = losses[influence.index(min(influence))]
    mean = sum(losses) / len(losses)
    inner = losses[1:-1]
    acceptance(
        METHOD, 2, "Removing the block of least macro influence costs less than removing any.",
        naive="remove a random block: the mean over all eight",
        figure=f"{chosen:.3f} against {mean:.3f} bits per character"
        f" ({sum(inner) / len(inner):.3f} over the six inner blocks)",
        holds=chosen < mean,
    )  # fmt: skip
    correlation = rank_correlation(influence, losses)
    acceptance(
        METHOD, 2, "Macro influence ranks blocks as their removal does: correlation above 0.5.",
        naive="no ranking: 0",
        figure=f"rank correlation {correlation:.2f}",
        holds=correlation > 0.5,
    )  # fmt: skip
    assert chosen < mean
    assert {0, 7} <= set(sorted(range(8), key=influence.__getitem__)[-4:])


@pytest.mark.slow
def test_what_grafts_add_to_low_rank_training(
    bits: Callable[[Program], float], fused: Fused, acceptance: Acceptance
) -> None:
    new, step = fused()
    gone = tuple(step.plan.decisions)
    for number, base_rate in ((3, 9.65e-6), (5, 1e-3)):
        with_grafts = new if number == 3 else fused(blocks=gone, base_rate=base_rate)[0]
        grafted = bits(with_grafts)
        alone = bits(fused(blocks=gone, base_rate=base_rate, coefficient="none")[0])
        words = "as published" if number == 3 else "tuned, 1e-3"
        acceptance(
            METHOD, number, f"Grafts are no worse than low-rank training alone, base rate {words}.",
            naive="the same group, data and steps without grafts",
            figure=f"{grafted:.3f} against {alone:.3f} bits per character",
            holds=grafted <= alone,
        )  # fmt: skip
        assert number != 3 or grafted <= alone


@pytest.mark.slow
def test_the_result_is_an_ordinary_smaller_model(
    toy_deep_gpt: Toy, sets: Sets, fused: Fused, acceptance: Acceptance
) -> None:
    new, _ = fused()
    model: Any = toy_deep_gpt.model
    small = GPT(dataclasses.replace(model.config, depth=6)).eval()
    small.load_state_dict(new.state_dict(renumbered=True))
    with torch.no_grad():
        error = float((small(*sets[0]) - run(new, sets[0])[0]).abs().max())
    acceptance(
        METHOD, 4, "The fused model loads into a plain GPT of six blocks, and gives the same.",
        naive="eight blocks",
        figure=f"largest difference of logits {error:.1g}",
        holds=error < 1e-5,
    )  # fmt: skip
    assert error < 1e-5


# Real sizes, no weights.


def on_meta(config: LlamaConfig) -> Program:
    with torch.device("meta"):
        model = Llama(config).eval()
        return capture(model, (torch.zeros(1, 16, dtype=torch.int64),))


@pytest.mark.parametrize(
    ("name", "config", "removed", "expected"),
    [
        ("LLaMA-2-7B", LLAMA_2_7B, 8, 5_119_348_736),
        ("LLaMA-2-7B", LLAMA_2_7B, 7, 5_321_732_096),
        ("LLaMA-3-8B", LLAMA_3_1_8B, 8, 6_285_365_248),
    ],
)
def test_parameters_at_real_sizes(
    name: str, config: LlamaConfig, removed: int, expected: int, acceptance: Acceptance
) -> None:
    program = on_meta(config)
    blocks = tuple(block.label for block in program.blocks()[20 : 20 + removed])
    new, (step,) = run_passes(program, [FuseBlocks(blocks=blocks)])
    before, after = step.receipt.parameters
    assert (after, len(new.blocks())) == (expected, 32 - removed)
    acceptance(
        METHOD, 6, f"{removed} of 32 blocks of {name} leave {expected:,} parameters.",
        naive=f"all blocks: {before:,}",
        figure=f"{after:,} ({after / before - 1:+.2%})",
        holds=after == expected,
    )  # fmt: skip


def test_trained_numbers_at_real_size(acceptance: Acceptance) -> None:
    program = on_meta(LLAMA_2_7B)
    pass_ = FuseBlocks(blocks=(program.blocks()[20].label,))
    plan = pass_.plan(program)
    new, _ = run_passes(program, [pass_])
    (stage,) = pass_.recovery(program, new, plan)
    grafts = [m for m in stage.weights.values() if isinstance(m, GraftedMatrix)]
    trained = sum(p.numel() for graft in grafts for p in graft.parameters())
    acceptance(
        METHOD, 6, "A group of seven blocks of LLaMA-2-7B trains 139,919,360 numbers, norms apart.",
        naive=f"all weights of the group: {7 * 202_383_360:,}",
        figure=f"{trained:,}",
        holds=trained == 139_919_360,
    )  # fmt: skip
    assert trained == 7 * 19_988_480 == 139_919_360
    assert len(grafts) == 49


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's coefficient; no two numbers are equal."""
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
