"""Certificates: three ways, per block, spliced, counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blockwright.driver import attempt
from blockwright.driver.account import Meter, sizes_of
from blockwright.driver.certify import Certificate, promise_of
from blockwright.driver.manager import run_passes
from blockwright.driver.numerics import three_way
from blockwright.ir.errors import VerifyError
from blockwright.ir.plain import fit, plain
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.ir.regions import Region
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip


@dataclass(frozen=True, kw_only=True)
class Narrow(Pass[Linear, int]):
    """Drop the bias of `down` layers; says what that saves, rightly or not."""

    name: ClassVar[str] = "narrow"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    off: int = 0

    def decide(self, region: Linear) -> int | Skip:
        if region.bias is None or not region.label.endswith("down"):
            return Skip("has no bias to drop", at=region)
        return region.bias.numel()

    def replace(self, region: Linear, decision: int) -> nn.Module:
        layer = nn.Linear(*reversed(region.weight.shape), bias=False)
        layer.weight = nn.Parameter(region.weight, requires_grad=False)
        return layer

    def predict(self, region: Linear, decision: int) -> Mapping[str, int]:
        return {"parameters": self.off - decision, "weight_bytes": -4 * decision}


def test_predictions_of_a_pass_are_measured(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [Narrow()], [[tokens]])
    assert step.certificate
    costs = step.certificate.costs
    assert costs["parameters"].predicted == costs["parameters"].measured
    assert costs["parameters"].measured == program.cost().parameters - 3 * 8
    assert costs["flops"].predicted == costs["flops"].measured
    with pytest.raises(VerifyError, match=r"narrow predicted .* and the new program has"):
        run_passes(program, [Narrow(off=1)], [[tokens]])


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 3}, {"activations": "int8"}])
@pytest.mark.parametrize("batch", [1, 3])
def test_counts_of_quantized_programs_agree(
    program: Program, options: dict[str, Any], batch: int
) -> None:
    tokens = torch.zeros(batch, 8, dtype=torch.long)
    recipe = [FuseProjections(), QuantizeWeights(embeddings=True, **options)]
    _, steps = run_passes(program, recipe, [[tokens]])
    for step in steps:
        assert step.certificate
        assert all(c.predicted == c.measured for c in step.certificate.costs.values())


def test_flops_agree_with_the_counter_of_torch(program: Program, tokens: Tensor) -> None:
    meter = Meter(program)
    with FlopCounterMode(display=False) as counter:
        run(program, [tokens], on_node=meter.saw)
    counted = counter.get_total_flops()  # which knows no attention kernel of the CPU
    assert meter.flops["linear"] == counted
    assert sizes_of(program, [tokens[:1]]) == {"batch": 1}


def test_a_weight_nobody_reads_is_not_activated(program: Program, tokens: Tensor) -> None:
    more = program.with_(
        tensors={**program.tensors, "spare": torch.zeros(5)},
        parameters=program.parameters | {"spare"},
    )
    meter = Meter(more)
    run(more, [tokens], on_node=meter.saw)
    counts = meter.counts()
    assert counts["parameters"] - counts["activated_parameters"] == 5


def test_blocks_are_compared_three_ways(program: Program, tokens: Tensor) -> None:
    _, steps = run_passes(program, [FuseProjections(), QuantizeWeights()], [[tokens]])
    exact, bounded = (step.certificate for step in steps)
    assert exact
    assert bounded
    assert list(bounded.blocks_exact) == list(bounded.blocks) == list(program.instances)
    for old, new in exact.blocks_exact.values():
        assert new < 8 * old + 1e-6
    for name, (old, new) in bounded.blocks_exact.items():
        assert old < 1e-5 < 1e-4 < new
        assert new == pytest.approx(bounded.blocks[name], rel=0.01)


def test_certificates_are_plain_data(program: Program, tokens: Tensor) -> None:
    _, (step,) = run_passes(program, [QuantizeWeights()], [[tokens]])
    text = json.dumps(plain(step.certificate))
    assert fit(json.loads(text), Certificate | None) == step.certificate


def test_a_bounded_pass_is_checked_as_spliced(
    program: Program, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules are right; what stands in the program is not."""

    def crossed(
        program: Program, replaced: Sequence[tuple[Region, nn.Module]], *, by: str
    ) -> Program:
        new = rewrite(program, replaced, by=by)
        first, second = (replace(new.instances[f"blocks.{i}"]) for i in (0, 1))
        swapped = {"blocks.0": second, "blocks.1": first}
        return new.with_(instances={**new.instances, **swapped})

    monkeypatch.setattr(attempt, "rewrite", crossed)
    with pytest.raises(VerifyError, match="away from the old one with the pass's modules in it"):
        run_passes(program, [QuantizeWeights()], [[tokens]])


def test_modules_called_in_place_give_what_splicing_gives(program: Program, tokens: Tensor) -> None:
    method = QuantizeWeights(activations="int8", embeddings=True)
    plan = method.plan(program)
    pairs = [(r, method.replace(r, plan.decisions[r.label])) for r in method.regions(program)
             if r.label in plan.decisions]  # fmt: skip
    (expected,) = run(rewrite(program, pairs, by="quantize-weights"), [tokens])
    (found,) = run(program, [tokens], instead=pairs)
    assert torch.equal(found, expected)


def test_any_two_runnable_things_can_be_compared() -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    w = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))

    def old(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0] @ w]

    def split(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0][:, :150] @ w[:150] + inputs[0][:, 150:] @ w[150:]]

    def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0].double() @ w.double()]

    def wrong(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [old(inputs)[0] * 1.001]

    same = three_way(old, split, exact, [[x], [2 * x]], ["y"])["y"]
    assert same.rounding
    assert same.error.new is not None
    assert same.error.new < 1e-6
    moved = three_way(old, wrong, exact, [[x]], ["y"])["y"]
    assert not moved.rounding
    assert moved.error.difference == pytest.approx(1e-3, rel=1e-3)
    assert three_way(old, old, None, [[x]], ["y"])["y"].error.old is None


def test_a_recipe_promises_as_little_as_its_weakest_pass() -> None:
    assert promise_of([]) is Promise.EXACT
    assert promise_of([FuseProjections(), QuantizeWeights()]) is Promise.BOUNDED
    assert promise_of([Narrow(), QuantizeWeights()]) is Promise.APPROXIMATE


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 5), (4, 3), (4, None)])
def test_bytes_of_codes_are_predicted_from_the_plan(
    program: Program, tokens: Tensor, bits: int, group_size: int | None, symmetric: bool
) -> None:
    method = QuantizeWeights(bits=bits, group_size=group_size, symmetric=symmetric, embeddings=True)
    new, (step,) = run_passes(program, [method], [[tokens]])
    assert step.certificate
    found = step.certificate.costs["weight_bytes"]
    stored = sum(t.numel() * t.element_size() for t in new.tensors.values())
    assert found.predicted == found.measured == stored
