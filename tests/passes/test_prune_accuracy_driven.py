"""PruneAccuracyDriven: rule, order and hierarchy of the search; masks against structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.calibration import JudgedSets
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention, FeedForward, Summand
from blockwright.ir.regions import regions
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.models.gpt import GPT
from blockwright.passes import PruneAccuracyDriven
from blockwright.passes.shared.cut import Cut, cut, masked
from blockwright.passes.shared.greedy import Rules, Search, layers_of
from blockwright.passes.shared.view import View
from blockwright.passes.shared.without import without
from blockwright.testing.families import family


def distance(outputs: Any, target: Tensor) -> Tensor:
    return (outputs - target).square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def spoilt(program: Program) -> tuple[Program, list]:
    """A model with three parts too many, and what it would say without them."""
    generator = torch.Generator().manual_seed(2)
    sets = [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(3)]
    right = dict(program.tensors)
    for name in ("blocks.2.down.weight", "blocks.2.down.bias"):
        right[name] = torch.zeros_like(right[name])
    right["blocks.1.attention.out.weight"] = right["blocks.1.attention.out.weight"].clone()
    right["blocks.1.attention.out.weight"][:, 4:] = 0
    right["blocks.0.down.weight"] = right["blocks.0.down.weight"].clone()
    right["blocks.0.down.weight"][:, 8:] = 0
    loud = {n: t * (3 if "down" in n or "out" in n else 1) for n, t in program.tensors.items()}
    right = {n: t * (3 if "down" in n or "out" in n else 1) for n, t in right.items()}
    teacher = program.with_(tensors=right)
    return program.with_(tensors=loud), [((x,), run(teacher, [x])[0]) for x in sets]


def search(program: Program, pairs: Any, **options: Any) -> tuple[Program, Any]:
    pass_ = PruneAccuracyDriven(**({"top_k": 0, "group_size": 4, "fine": 3.0} | options))
    sets = JudgedSets(program, pairs, distance)
    new, (step,) = run_passes(
        program, [pass_], [list(pairs[0][0])], calibration=sets, recover=False
    )
    return new, step


def mean_loss(program: Program, pairs: Any) -> float:
    return torch.cat([distance(run(program, list(x))[0], y) for x, y in pairs]).mean().item()


def test_golden(spoilt: tuple, golden: Callable[[str, str], None]) -> None:
    new, step = search(*spoilt)
    golden("prune_accuracy_driven", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_what_is_too_much_goes(spoilt: tuple) -> None:
    program, pairs = spoilt
    new, step = search(program, pairs)
    found = step.plan.decisions
    assert found["blocks.2.up_down.residual"] == Cut(drop=True)
    assert found["blocks.1.attention"].keep == (0,)
    assert mean_loss(new, pairs) < 0.2 * mean_loss(program, pairs)
    assert new.cost().parameters < program.cost().parameters
    assert step.receipt.statistics["sublayers dropped"] >= 1


def test_the_loss_falls_with_every_step_and_ends_where_the_new_model_is(spoilt: tuple) -> None:
    program, pairs = spoilt
    pass_ = PruneAccuracyDriven(top_k=2, group_size=4)
    evidence = pass_.measure(program, JudgedSets(program, pairs, distance))
    losses = evidence.regions["losses"]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[0] == pytest.approx(mean_loss(program, pairs), rel=1e-5)
    plan = pass_.plan(program, evidence)
    new, _ = run_passes(program, [pass_], plans=[plan])
    assert mean_loss(new, pairs) == pytest.approx(losses[-1], rel=1e-4)


class Scripted:
    """Stands for a `View`: gives losses from a list and notes what was tried."""

    def __init__(self, *losses: Sequence[float]) -> None:
        self.given: Iterator[Sequence[float]] = iter(losses)
        self.tried: list[list[str]] = []
        self.evaluations = 0

    def stop(self, node: Any, changes: Any = ()) -> None: ...

    def losses(self, changes: Any = ()) -> Tensor:
        self.tried.append([region.label for region, _ in changes])
        self.evaluations += 1
        return torch.tensor(next(self.given, (9.0,) * 4), dtype=torch.float64)


def scripted(
    monkeypatch: pytest.MonkeyPatch, program: Program, *losses: Sequence[float], **options: Any
) -> tuple[Search, Scripted]:
    view = Scripted(*losses)
    monkeypatch.setattr("blockwright.passes.shared.greedy.View", lambda *_: view)
    given = {
        "top_k": None,
        "group_size": 4,
        "fine": 1.1,
        "majority": 0.5,
        "last_first": True,
        "budget": None,
    }
    found = Search(program, None, Rules(**(given | options)), "test")
    found.run(list(regions(program, Summand, Attention, FeedForward)))
    return found, view


def test_lower_than_the_lowest_and_no_worse_than_at_first_for_most(
    monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    found, _ = scripted(
        monkeypatch,
        program,
        (1.0, 1.0, 1.0, 1.0),
        (0.0, 0.0, 1.5, 1.6),  # lower, but worse for two of four: its parts are tried
        *[(9.0, 9.0, 9.0, 9.0)] * 12,
        (9.0, 9.0, 9.0, 9.0),  # attention of the last layer: not lower
        (0.2, 0.2, 1.0, 2.0),  # lower, and no worse than at first for three
        (0.9, 0.9, 0.9, 0.2),  # worse for two than the step before, which does not count
        (0.9, 0.9, 0.9, 0.9),  # no worse than at first for any, but not below the lowest
        fine=1.0,
    )
    assert found.losses == pytest.approx([1.0, 0.85, 0.725])
    assert [label for label, c in found.cuts.items() if c.drop] == [
        "blocks.1.up_down.residual",
        "blocks.1.attention.residual",
    ]


def test_from_the_last_layer_to_the_first_and_parts_only_where_it_is_close(
    monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    ones = (1.0,) * 4
    _, view = scripted(
        monkeypatch, program, ones, (1.09,) * 4, ones, ones, ones, (1.2,) * 4, ones, top_k=3
    )
    tried = [labels[-1] for labels in view.tried[1:]]
    assert tried[:3] == [f"blocks.{i}.attention" for i in range(3)]
    assert tried[3] == "blocks.2.up_down.residual"
    _, view = scripted(monkeypatch, program, ones, (1.09,) * 4, ones, ones, ones, (1.2,) * 4, ones)
    tried = [labels[-1] for labels in view.tried[1:]]
    whole, part = "blocks.{}.up_down.residual", "blocks.{}.up_down"
    assert tried[0] == whole.format(2)
    assert tried[1:13] == [part.format(2)] * 12, "twelve twelfths of twelve neurons"
    _, view = scripted(monkeypatch, program, ones, last_first=False)
    assert [labels[-1] for labels in view.tried[1:]] == [
        f"blocks.{i}.{name}.residual" for i in range(3) for name in ("up_down", "attention")
    ]


def test_the_search_of_bert_base_takes_as_many_evaluations_as_the_paper_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from blockwright.models import bert

    with torch.device("meta"):
        model = bert.Bert(replace(bert.BERT_BASE)).eval()
        program = bw.capture(model, model.example_inputs(seq=128))
    monkeypatch.setattr("blockwright.passes.shared.greedy.masked", lambda part, decision: None)
    least, _ = scripted(monkeypatch, program, (1.0,) * 4, top_k=30, group_size=256)
    most, _ = scripted(monkeypatch, program, *[(1.0,) * 4] * 400, top_k=30, group_size=256)
    assert (least.evaluations - 1, most.evaluations - 1) == (36, 324)


def test_a_budget_ends_the_search(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    found, view = scripted(monkeypatch, program, (1.0,) * 4, budget=4)
    assert view.evaluations == 4
    assert "was not tried: the budget is spent" in found.tried.values()


def test_what_comes_before_is_computed_once(spoilt: tuple) -> None:
    program, pairs = spoilt
    sets = JudgedSets(program, pairs, distance)
    attention = program.attentions()[2]
    change = (attention, masked(attention, Cut(keep=(0,))))
    earlier = program.attentions()[0]
    before = (earlier, masked(earlier, Cut(keep=(1,))))
    (layer,) = layers_of(program, regions(program, Summand, Attention, FeedForward))[2:]
    whole, view = View(program, sets), View(program, sets)
    view.stop(layer.start, [before])
    assert torch.equal(view.losses([before, change]), whole.losses([before, change]))
    small = View(program, sets, cache_bytes=1)
    small.stop(layer.start, [before])
    assert torch.equal(small.losses([before, change]), whole.losses([before, change]))


CUTS = {
    "heads": (Attention, Cut(keep=(0,))),
    "hard": (Attention, Cut(top_k=2)),
    "hard heads": (Attention, Cut(keep=(1,), top_k=2)),
    "neurons": (FeedForward, Cut(keep=(0, 3, 4, 7))),
    "dropped": (Summand, Cut(drop=True)),
}


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "vit", "dit"])
@pytest.mark.parametrize("what", CUTS)
def test_structure_computes_what_the_mask_does(name: str, what: str) -> None:
    of_family = family(name)
    program, inputs = of_family.program, of_family.inputs
    kind, decision = CUTS[what]
    found = program.regions(kind)
    if kind is Summand:
        new = rewrite(program, [(r, without(r)) for r in found[1:]], by="test")
        expected = run(program, inputs, instead=[(r, without(r)) for r in found[1:]])
    else:
        new = rewrite(program, [(r, cut(r, decision)) for r in found], by="test")
        expected = run(program, inputs, instead=[(r, masked(r, decision)) for r in found])
    for ours, theirs in zip(run(new, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt", "bert", "dit"])
def test_nothing_cut_is_the_same_bits(name: str) -> None:
    of_family = family(name)
    program, inputs = of_family.program, of_family.inputs
    parts = program.regions(Attention) + program.regions(FeedForward)
    whole = run(program, inputs, instead=[(part, masked(part, Cut())) for part in parts])
    for ours, theirs in zip(whole, run(program, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_finding_nothing_is_an_error_that_says_what_was_tried(
    program: Program, tokens: Tensor
) -> None:
    pairs = [((tokens,), run(program, [tokens])[0])]
    with pytest.raises(NoMatchError, match=r"stays: without it the loss is .*, not 0"):
        search(program, pairs)
    new, step = search(program, pairs, allow_no_match=True)
    assert new is program
    assert not step.receipt.changed


def test_needs_a_task(gpt: GPT, program: Program, tokens: Tensor) -> None:
    with pytest.raises(OptionError, match="judges by the loss of a task, and there is none"):
        run_passes(program, [PruneAccuracyDriven()], [[tokens]])
    with pytest.raises(OptionError, match="decides by the loss of a task"):
        PruneAccuracyDriven().plan(program)
    broken = [((tokens,), torch.full((), torch.nan))]
    with pytest.raises(
        OptionError, match="the loss of the model is nan before anything is changed"
    ):
        search(program, broken)
    with pytest.raises(OptionError, match="there are no samples"):
        PruneAccuracyDriven().measure(program, JudgedSets(program, [], distance))
    engine = bw.compile(
        gpt, [PruneAccuracyDriven(top_k=4, allow_no_match=True)], (tokens,), backend="eager",
        calibration=[((tokens,), torch.zeros(2, 8, 32))], loss=distance,
    )  # fmt: skip
    assert engine(tokens).shape == (2, 8, 32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": -1}, "top_k=-1 is too small; use 0 or more"),
        ({"group_size": 0}, "group_size=0 is too small"),
        ({"fine": 0.5}, "fine=0.5 is too small"),
        ({"majority": 1.0}, "majority=1.0 is no fraction"),
        ({"order": "inside-out"}, "order=inside-out is not supported"),
        ({"budget": 0}, "budget=0 is too small"),
    ],
)
def test_refuses_bad_options(options: dict, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        PruneAccuracyDriven(**options)
