"""Requirements of whole recipes, and the orders solved from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.facts import check_recipe
from blockwright.driver.manager import run_passes
from blockwright.driver.order import ordered
from blockwright.driver.recipe import parse_toml
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.facts import Fact, objection
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.passes import Canonicalize, FoldConstants, FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip


@dataclass(frozen=True, kw_only=True)
class Toy(Pass[Linear, int]):
    """Do nothing."""

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def decide(self, region: Linear) -> int | Skip:
        raise AssertionError("a weight was looked at")

    def replace(self, region: Linear, decision: int) -> nn.Module:
        raise AssertionError("a weight was touched")


@dataclass(frozen=True, kw_only=True)
class Split(Toy):
    name: ClassVar[str] = "dense-to-moe"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS, Fact.CANONICAL})
    verbs: ClassVar[Mapping[Fact, str]] = {Fact.DENSE_WEIGHTS: "must split"}


@dataclass(frozen=True, kw_only=True)
class Pack(Toy):
    name: ClassVar[str] = "quantize-blockwise"

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.DENSE_WEIGHTS})


@dataclass(frozen=True, kw_only=True)
class Tie(Toy):
    name: ClassVar[str] = "share-blocks"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.DISTINCT_BLOCKS})


@dataclass(frozen=True, kw_only=True)
class Choose(Toy):
    name: ClassVar[str] = "choose-blocks"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DISTINCT_BLOCKS})

    def ends(self) -> frozenset[Fact]:
        return frozenset({Fact.DENSE_WEIGHTS})


def names(passes: list[Pass[Any, Any]]) -> list[str]:
    return [pass_.name for pass_ in passes]


def test_a_refusal_names_both_and_the_order_that_works(program: Program) -> None:
    with pytest.raises(OptionError) as caught:
        run_passes(program, [Canonicalize(), Pack(), Split()])
    assert caught.value.what == (
        "quantize-blockwise packs the weights that dense-to-moe must split; put it after"
        " dense-to-moe."
    )


@pytest.mark.parametrize("fact", list(Fact))
def test_every_fact_has_words_for_a_refusal(fact: Fact) -> None:
    assert fact == str(fact.value)
    assert all((fact.thing, fact.ended, fact.needed))


def test_facts_hold_of_a_plain_model(program: Program) -> None:
    assert [objection(program, fact) for fact in Fact] == [None] * len(Fact)


def test_packed_weights_are_an_objection(program: Program) -> None:
    some, _ = run_passes(program, [QuantizeWeights(include=("*.up",))])
    assert objection(some, Fact.DENSE_WEIGHTS) is None
    tied = QuantizeWeights()  # the head is tied to the table and stays
    mostly, _ = run_passes(program, [tied])
    assert objection(mostly, Fact.DENSE_WEIGHTS) is None
    torch.manual_seed(0)
    packed, _ = run_passes(capture(nn.Linear(4, 4), (torch.zeros(2, 4),)), [QuantizeWeights()])
    what, where = objection(packed, Fact.DENSE_WEIGHTS) or ("", "")
    assert what == "the weights are packed already (by quantize-weights)"
    assert where
    with pytest.raises(OptionError, match="fuse-projections needs that weights are dense"):
        check_recipe([FuseProjections()], packed)
    check_recipe([FuseProjections(allow_no_match=True)], packed)


class Spelled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_what_is_spelled_out_is_an_objection() -> None:
    spelled = capture(Spelled(), (torch.randn(2, 3),))
    assert "spelled activation takes 2 ops" in (objection(spelled, Fact.CANONICAL) or ("",))[0]
    with pytest.raises(OptionError, match="put canonicalize before dense-to-moe"):
        check_recipe([Split()], spelled)
    check_recipe([Canonicalize(), Split()], spelled)
    canonical, _ = run_passes(spelled, [Canonicalize()])
    check_recipe([Split()], canonical)


class Twice(nn.Module):
    """Two blocks with one set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.blocks[1][0].weight = self.blocks[0][0].weight  # type: ignore[index]
        self.blocks[1][0].bias = self.blocks[0][0].bias  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_blocks_with_the_same_weights_are_an_objection() -> None:
    twice = capture(Twice(), (torch.zeros(2, 4),))
    if not twice.instances:
        pytest.skip("not folded into instances")
    what, where = objection(twice, Fact.DISTINCT_BLOCKS) or ("", "")
    assert what.endswith("read the same weights")
    assert where in twice.instances


def test_no_feed_forward_is_an_objection() -> None:
    linear = capture(nn.Linear(4, 4), (torch.zeros(2, 4),))
    assert objection(linear, Fact.PLAIN_FEED_FORWARDS) is not None


def test_an_order_is_solved_and_stays_near_the_given_one() -> None:
    given = [Pack(), FoldConstants(), Split(), Canonicalize()]
    assert names(ordered(given, "auto")) == [
        "fold-constants", "canonicalize", "dense-to-moe", "quantize-blockwise"
    ]  # fmt: skip
    works = [Canonicalize(), FoldConstants(), Split(), Pack()]
    assert names(ordered(works, "auto")) == names(works)
    assert names(ordered(given, "given")) == names(given)


def test_a_cycle_is_named() -> None:
    with pytest.raises(OptionError) as caught:
        ordered([Tie(), Choose()], "auto")
    assert caught.value.what.startswith("no order of share-blocks, choose-blocks works: ")
    assert "share-blocks ties together the blocks that choose-blocks must tell apart" in str(
        caught.value
    )
    with pytest.raises(OptionError, match="use given or auto"):
        ordered([], "best")


def test_order_is_taken_everywhere(program: Program) -> None:
    recipe = "quantize-weights, fuse-projections"
    engine = bw.compile(program, recipe, order="auto", backend="eager")
    assert engine.record["recipe"] == "fuse-projections, quantize-weights"
    assert [step["pass"] for step in engine.record["steps"]] == [
        "fuse-projections", "quantize-weights"
    ]  # fmt: skip
    toml = (
        'order = "auto"\n[[pass]]\nname = "quantize-weights"\n[[pass]]\nname = "fuse-projections"\n'
    )
    assert names(parse_toml(toml)) == ["fuse-projections", "quantize-weights"]
    with pytest.raises(OptionError, match="put it after fuse-projections"):
        bw.compile(program, recipe, backend="eager")
