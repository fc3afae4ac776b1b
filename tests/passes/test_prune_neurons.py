"""PruneNeurons: fires, declines, is exact where removed columns are zero, refuses bad options."""

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
from blockwright.passes import PruneNeurons
from blockwright.passes.shared.importance import METHODS, neuron_importance


def test_golden(program: Program, tokens: Tensor, golden: Callable[[str, str], None]) -> None:
    new, (step,) = run_passes(program, [PruneNeurons(keep=6)], [[tokens]])
    golden("prune_neurons", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_every_network_keeps_its_share(program: Program, tokens: Tensor) -> None:
    for options, width in (({"keep_ratio": 0.4}, 5), ({"keep": 7, "multiple_of": 4}, 8)):
        new, (step,) = run_passes(program, [PruneNeurons(**options)], [[tokens]])
        assert [ffn.ffn_dim for ffn in new.feed_forwards()] == [width] * 3
        assert len({i.block for i in new.instances.values()}) == 1, "blocks no longer share a graph"
        assert "blocks.0.up.weight" in new.tensors
        assert all(len(kept) == width for kept in step.plan.decisions.values())


def test_dead_neurons_are_not_missed(gpt: GPT, tokens: Tensor) -> None:
    half_dead = copy.deepcopy(gpt)
    with torch.no_grad():
        for block in half_dead.blocks:
            block.down.weight[:, ::2] = 0
            block.up.weight[1::2] *= 3
    old = bw.capture(half_dead, (tokens,))
    for importance in ("magnitude", "activation", "taylor"):
        new, _ = run_passes(old, [PruneNeurons(importance=importance)], [[tokens]])
        torch.testing.assert_close(run(new, [tokens]), run(old, [tokens]))


def test_taylor_follows_the_loss_it_is_given(program: Program, tokens: Tensor) -> None:
    class Judged:
        def __init__(self, weight: float) -> None:
            self.weight = weight

        def __iter__(self):
            return iter([[tokens]])

        def pairs(self):
            return iter([([tokens], None)])

        def loss(self, outputs, target):
            return self.weight * outputs[0].square().flatten(1).sum(1)

    ffns = program.feed_forwards()
    one, two = (neuron_importance(ffns, "taylor", Judged(w)) for w in (1.0, 2.0))
    for label, scores in one.items():
        torch.testing.assert_close(two[label], 2 * scores)
        assert scores.shape == (12,)


def test_taylor_is_the_sum_over_samples(program: Program, tokens: Tensor) -> None:
    """One row of the loss at a time, by hand."""

    class Squares:
        def __iter__(self):
            return iter([[tokens]])

        def pairs(self):
            return iter([([tokens], None)])

        def loss(self, outputs, target):
            return outputs[0].square().flatten(1).sum(1)

    ffn = program.feed_forwards()[1]
    found = neuron_importance([ffn], "taylor", Squares())[ffn.label]
    expected = torch.zeros(12)
    for row in range(len(tokens)):
        module = program.module()
        named = {n: p.requires_grad_() for n, p in module.named_parameters() if "blocks.1." in n}
        module(tokens)[0][row].square().sum().backward()
        slopes = {n.removeprefix("blocks.1."): (p * p.grad).abs() for n, p in named.items()}
        expected += slopes["up.weight"].sum(1) + slopes["down.weight"].sum(0)
        expected += slopes.get("up.bias", 0)
    torch.testing.assert_close(found, expected)


def test_random_scores_do_not_depend_on_company(program: Program) -> None:
    ffns = program.feed_forwards()
    together = neuron_importance(ffns, "random", seed=3)
    alone = neuron_importance(ffns[1:2], "random", seed=3)
    assert torch.equal(together[ffns[1].label], alone[ffns[1].label])
    assert not torch.equal(together[ffns[0].label], together[ffns[1].label])
    assert set(METHODS) == {"magnitude", "taylor", "activation", "random"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 12}, "has 12 neurons, 12 would be kept"),
        ({"keep_ratio": 0.01}, r"has 12 neurons, of which prune-neurons\{.*0.01\} would keep none"),
        ({"include": ("head",)}, "is excluded by pattern"),
    ],
)
def test_declines(program: Program, options: dict, reason: str) -> None:
    with pytest.raises(NoMatchError, match=reason):
        run_passes(program, [PruneNeurons(**options)])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio=0.0 is no fraction to keep"),
        ({"keep_ratio": 1.2}, "keep_ratio=1.2 is no fraction to keep"),
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"multiple_of": 0}, "multiple_of=0 divides nothing"),
        ({"importance": "luck"}, "importance=luck is not supported"),
    ],
)
def test_refuses_bad_options(options: dict, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        PruneNeurons(**options)


def test_scores_on_inputs_need_inputs(program: Program, tokens: Tensor) -> None:
    with pytest.raises(OptionError, match="scores are taken from calibration inputs"):
        run_passes(program, [PruneNeurons(importance="taylor")])
    with pytest.raises(OptionError, match="importance=taylor is measured on calibration inputs"):
        PruneNeurons(importance="taylor").plan(program)
    broken = program.with_(
        tensors=program.tensors | {"blocks.0.up.weight": torch.full((12, 8), torch.nan)}
    )
    with pytest.raises(OptionError, match=r"the activation scores of .* are no numbers"):
        run_passes(broken, [PruneNeurons(importance="activation")], [[tokens]])


def test_a_group_of_neurons_of_bert_base_has_as_many_parameters_as_the_paper_says() -> None:
    program = bert_base()
    cut = PruneNeurons(keep=3072 - 256, importance="random", include=("blocks.0.*",))
    new, (step,) = run_passes(program, [cut])
    assert len(step.receipt.changed) == 1
    assert program.cost().parameters - new.cost().parameters == 2 * 768 * 256 + 256 == 393_472
    with pytest.raises(OptionError, match="meta device have no magnitude"):
        run_passes(program, [replace(cut, importance="magnitude")])


def bert_base() -> Program:
    with torch.device("meta"):
        model = bert.Bert(replace(bert.BERT_BASE, depth=2)).eval()
        inputs = model.example_inputs()
    return bw.capture(model, inputs)
