"""PruneHeads: fires, declines, is exact where removed columns are zero, refuses bad options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models import bert
from blockwright.models.gpt import GPT
from blockwright.passes import PruneHeads, QuantizeWeights
from blockwright.testing.families import family


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [PruneHeads()], [[tokens]])
    golden("prune_heads", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_dead_heads_are_not_missed(gpt: GPT, tokens: Tensor, importance: str) -> None:
    half_dead = copy.deepcopy(gpt)
    with torch.no_grad():
        for index, block in enumerate(half_dead.blocks):
            first = index % 2 * 4
            block.attention.out.weight[:, first : first + 4] = 0
    old = bw.capture(half_dead, (tokens,))
    new, (step,) = run_passes(old, [PruneHeads(importance=importance)], [[tokens]])
    assert list(step.plan.decisions.values()) == [[1], [0], [1]]
    torch.testing.assert_close(run(new, [tokens]), run(old, [tokens]))


def test_gradients_are_taken_where_the_caller_wants_none(program: Program, tokens: Tensor) -> None:
    wanted = PruneHeads(importance="taylor")
    with torch.no_grad():
        found = wanted.measure(program, [[tokens]])
    known = wanted.measure(program, [[tokens]])
    assert found is not None
    assert known is not None
    torch.testing.assert_close(found.regions, known.regions)


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"keep": 2}, (2, 1)),
        ({"keep": 2, "unit": "query"}, (2, 2)),
        ({"keep_ratio": 0.5, "unit": "query"}, (2, 2)),
    ],
)
def test_heads_that_share_keys_go_in_groups_or_evenly(options: dict, heads: tuple) -> None:
    llama = family("llama")
    new, _ = run_passes(llama.program, [PruneHeads(**options)], [llama.inputs])
    assert {(a.heads, a.kv_heads) for a in new.attentions()} == {heads}
    assert new.cost().parameters < llama.program.cost().parameters


def test_declines(program: Program) -> None:
    def refused(options: dict, reason: str, old: Program = program) -> None:
        with pytest.raises(NoMatchError, match=reason):
            run_passes(old, [PruneHeads(**options)])

    refused({"keep": 2}, "has 2 heads, all of which would be kept")
    refused({"keep_ratio": 0.1}, "has 2 heads, of which .*0.1.* would keep none")
    refused({"include": ("head",)}, "is excluded by pattern")
    refused({"keep": 3}, "has 4 heads, of which 3 are no whole groups", family("llama").program)
    refused({}, "has one head", family("swin").program)


def test_declines_packed_weights(program: Program, tokens: Tensor) -> None:
    packed, _ = run_passes(program, [QuantizeWeights(include=("*.attention.*",))], [[tokens]])
    with pytest.raises(NoMatchError, match="without a plain linear layer of their own"):
        run_passes(packed, [PruneHeads()])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep_ratio": -1.0}, "keep_ratio=-1.0 is no fraction to keep"),
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"unit": "key"}, "unit=key is not supported; use one of group, query"),
        ({"importance": "luck"}, "importance=luck is not supported"),
    ],
)
def test_refuses_bad_options(options: dict, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        PruneHeads(**options)


def test_a_head_of_bert_base_has_as_many_parameters_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = bert.Bert(replace(bert.BERT_BASE, depth=2)).eval()
        program = bw.capture(model, model.example_inputs())
    new, _ = run_passes(program, [PruneHeads(keep=11, importance="random", include=("*.0.*",))])
    assert program.cost().parameters - new.cost().parameters == 4 * 768 * 64 + 3 * 64 == 196_800
