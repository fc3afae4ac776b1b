"""AxFormer: a ViT that has learnt too few digits by heart, and what is better left out of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import mean

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import blockwright as bw
from blockwright.driver.calibration import JudgedSets
from blockwright.driver.manager import run_passes
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention, FeedForward, Summand
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.models import bert
from blockwright.models.vit import ViT
from blockwright.passes import DropSublayers, PruneAccuracyDriven, PruneHeads, PruneNeurons
from blockwright.passes.base import Evidence
from blockwright.passes.shared.cut import Cut, coupled_of, cut, masked
from blockwright.passes.shared.importance import importance
from blockwright.passes.shared.without import without
from blockwright.testing.acceptance import Acceptance
from blockwright.testing.toys import data, training, vision
from blockwright.testing.toys.data import Images

pytestmark = pytest.mark.acceptance
LEARNT, JUDGED, BATCH = 150, 300, 60  # images that are learnt, and that the search judges by
GROUP = 32  # neurons tried at once
PLAN = training.Plan(steps=400, batch=32, rate=1e-3, weight_decay=0.0)
SEARCH = PruneAccuracyDriven(top_k=5, group_size=GROUP)


@dataclass(frozen=True)
class Setting:
    """An over-fitted model, the images a search judges by, and others it never sees."""

    program: Program
    judged: JudgedSets
    test: Images

    def test_loss(self, program: Program) -> float:
        with torch.no_grad():
            logits = [run(program, [x])[0] for x in self.test.images.split(BATCH)]
        return F.cross_entropy(torch.cat(logits), self.test.labels).item()


@cache
def setting() -> Setting:
    """All three sets of images are apart; the first two come of the training images."""
    images, test = data.digits()
    learnt = Images(images.images[:LEARNT], images.labels[:LEARNT])
    held = slice(LEARNT, LEARNT + JUDGED)

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(LEARNT, (PLAN.batch,), generator=generator)
        return F.cross_entropy(model(learnt.images[chosen]), learnt.labels[chosen])

    model = training.train(partial(ViT, vision.CONFIG), loss, PLAN, "over-fitted vit")
    program = bw.capture(model, (images.images[:BATCH],))
    pairs = zip(images.images[held].split(BATCH), images.labels[held].split(BATCH), strict=True)
    sets = [((x,), y) for x, y in pairs]
    return Setting(
        program, JudgedSets(program, sets, partial(F.cross_entropy, reduction="none")), test
    )


@cache
def searched(fine: float = 1.1) -> tuple[Program, Evidence]:
    """Return the pruned model and what the search saw."""
    here, pass_ = setting(), replace(SEARCH, fine=fine)
    evidence = pass_.measure(here.program, here.judged)
    assert evidence is not None
    plan = pass_.plan(here.program, evidence)
    new, _ = run_passes(here.program, [pass_], plans=[plan])
    return new, evidence


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_better_on_what_it_was_not_judged_by(acceptance: Acceptance) -> None:
    here, (new, evidence) = setting(), searched()
    first, *_, last = evidence.regions["losses"]
    before, after = here.test_loss(here.program), here.test_loss(new)
    cuts = evidence.regions["cuts"].values()
    whole, parts = sum(c.drop for c in cuts), sum(c.removed for c in cuts)
    acceptance(
        "axformer",
        1,
        "The search lowers the loss it judges by, and that on images it never saw.",
        naive="the over-fitted model as it is",
        figure=f"judged {last:.4f} against {first:.4f}, unseen {after:.4f} against {before:.4f}"
        f" nats; {whole} sublayers, {parts} heads and neurons gone",
        holds=last < first and after < before,
    )
    assert last < first
    assert after < before + 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_better_than_other_choices_of_as_many_parameters(acceptance: Acceptance) -> None:
    here, (new, _) = setting(), searched()
    wanted = here.program.cost().parameters - new.cost().parameters
    chosen = here.test_loss(new)
    small = here.test_loss(without_weakest(here.program, wanted, "magnitude", 0))
    others = [without_weakest(here.program, wanted, "random", seed) for seed in range(3)]
    by_chance = mean(map(here.test_loss, others))
    acceptance(
        "axformer",
        2,
        "For as many removed parameters the loss on unseen images is lower than of other choices.",
        naive="heads and groups of neurons of smallest magnitude; at random, mean of 3 seeds",
        figure=f"{wanted} parameters gone: {chosen:.4f}, magnitude {small:.4f}, random"
        f" {by_chance:.4f} nats",
        holds=chosen < min(small, by_chance),
    )
    assert all(p.cost().parameters <= here.program.cost().parameters - wanted for p in others)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_sublayers_first_saves_evaluations(acceptance: Acceptance) -> None:
    coarse, every = (searched(fine)[1].regions for fine in (1.1, 1e9))
    acceptance(
        "axformer",
        3,
        "Parts only of sublayers that are nearly not needed: as good within 5%, for less work.",
        naive="all heads and groups of neurons of every sublayer",
        figure=f"{coarse['losses'][-1]:.4f} nats in {coarse['evaluations']} evaluations,"
        f" {every['losses'][-1]:.4f} in {every['evaluations']}",
        holds=coarse["losses"][-1] < 1.05 * every["losses"][-1]
        and coarse["evaluations"] < every["evaluations"],
    )
    assert coarse["evaluations"] <= every["evaluations"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_structure_is_smaller_and_computes_the_same(acceptance: Acceptance) -> None:
    here, (new, evidence) = setting(), searched()
    x = here.test.images[:BATCH]
    changes = []
    for region in SEARCH.regions(here.program):
        decision = evidence.regions["cuts"].get(region.label)
        if decision is not None:
            drops = isinstance(region, Summand)
            changes.append((region, without(region) if drops else masked(region, decision)))
    expected = run(here.program, [x], instead=changes)[0]
    error = (run(new, [x])[0] - expected).abs().max().item() / expected.abs().max().item()
    before, after = here.program.cost(), new.cost()
    acceptance(
        "axformer",
        4,
        "The pruned model is smaller and computes what the masked one does.",
        naive="the search's masks",
        figure=f"{after.parameters} of {before.parameters} parameters,"
        f" {after.flops / before.flops:.0%} of the FLOPs, relative difference {error:.1e}",
        holds=error < 1e-5 and after.parameters < before.parameters,
    )
    assert error < 1e-5
    assert after.parameters < before.parameters


@pytest.mark.parametrize(
    ("what", "pass_", "parameters"),
    [
        ("an attention", DropSublayers(sublayers=("blocks.1.attention*",)), 2_362_368),
        ("a feed-forward network", DropSublayers(sublayers=("blocks.1.up*",)), 4_722_432),
        ("a head", PruneHeads(keep=11, importance="random", include=("*.1.*",)), 196_800),
        ("256 neurons", PruneNeurons(keep=2816, importance="random", include=("*.1.*",)), 393_472),
    ],
)
def test_parameters_of_bert_base(
    acceptance: Acceptance, what: str, pass_: bw.passes.Pass, parameters: int
) -> None:
    program = bert_base()
    new, _ = run_passes(program, [pass_])
    found = program.cost().parameters - new.cost().parameters
    acceptance(
        "axformer",
        5,
        f"BERT-base without {what} has {parameters:,} parameters less.",
        naive="the figure of the paper's model",
        figure=f"{found:,}",
        holds=found == parameters,
    )
    assert found == parameters


@cache
def bert_base() -> Program:
    with torch.device("meta"):
        model = bert.Bert(bert.BERT_BASE).eval()
        return bw.capture(model, model.example_inputs())


def without_weakest(program: Program, parameters: int, by: str, seed: int) -> Program:
    """Return a model without heads and groups of neurons, lowest scores first."""
    parts = [*program.regions(Attention), *program.regions(FeedForward)]
    scores = importance([coupled_of(part) for part in parts], by, seed=seed)
    elements = []
    for part in parts:
        size = 1 if isinstance(part, Attention) else GROUP
        weights = sum(
            part.tensor(share.slot).numel() // len(share.units) * share.units.count(0)
            for share in coupled_of(part).shares
        )
        for start in range(0, coupled_of(part).count, size):
            units = range(start, start + size)
            score = scores[part.label][start : start + size].square().sum() / (weights * size)
            elements.append((float(score), part, units, weights * size))
    kept = {part.label: set(range(coupled_of(part).count)) for part in parts}
    for _, part, units, count in sorted(elements, key=lambda element: element[0]):
        if parameters > 0:
            kept[part.label] -= set(units)
            parameters -= count
    return rewrite(program, list(narrowed(program, parts, kept)), by="test")


def narrowed(program: Program, parts: list, kept: dict[str, set[int]]):
    """Yield what is replaced; a sublayer that keeps nothing goes as a whole."""
    sums = {s.sublayer.region.label: s for s in program.regions(Summand)}
    for part in parts:
        units = tuple(sorted(kept[part.label]))
        if not units:
            yield sums[part.label], without(sums[part.label])
        elif len(units) < coupled_of(part).count:
            yield part, cut(part, Cut(keep=units))
