"""Every pair of passes is classified, and the page says what is found."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor, nn

import blockwright
from blockwright.ir.facts import Fact
from blockwright.ir.program import Program
from blockwright.ir.recognize import Linear
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass, Promise, Skip
from blockwright.testing.composition import Verdict, Word, classify
from blockwright.testing.composition_page import cells, judge, read, render
from blockwright.testing.families import FAMILIES, Family, family

PAGE = Path(blockwright.__file__).parent / "docs" / "composition.md"
STALE = "docs/composition.md is stale; run `make composition`"
SIZE = 12


def columns() -> list[str]:
    """Return the families the page was made for, in its order."""
    return list(dict.fromkeys(name for _, _, name in read(PAGE.read_text())))


@dataclass(frozen=True, kw_only=True)
class Scale(Pass[Linear, float]):
    """Multiply the output of every `up` layer and then add to it."""

    name: ClassVar[str] = "scale"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    factor: float = 1.0
    shift: float = 0.0

    def decide(self, region: Linear) -> float | Skip:
        if not region.label.endswith("up"):
            return Skip("is no up layer", at=region)
        return self.factor

    def replace(self, region: Linear, decision: float) -> nn.Module:
        return Scaled(region.weight, region.bias, decision, self.shift)


class Scaled(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, factor: float, shift: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias if bias is None else nn.Parameter(bias)
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.factor + self.shift


@dataclass(frozen=True, kw_only=True)
class Lie(Scale):
    """The same, and called exact."""

    name: ClassVar[str] = "lie"
    promise: ClassVar[Promise] = Promise.EXACT


@dataclass(frozen=True, kw_only=True)
class Dense(Scale):
    """The same, before weights are packed only."""

    name: ClassVar[str] = "dense"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.DENSE_WEIGHTS})

    def ends(self) -> frozenset[Fact]:
        return self.requires


@pytest.fixture
def model(program: Program, tokens: Tensor) -> Family:
    return Family("gpt", program, [tokens])


@pytest.mark.parametrize(
    ("first", "second", "word", "why"),
    [
        (Scale(factor=2), Scale(factor=4), Word.COMMUTES, "same outputs, bit by bit"),
        (Scale(factor=1.1), Scale(factor=0.7), Word.COMMUTES, "up to rounding"),
        (Scale(factor=3), Scale(shift=1), Word.ORDERED, "nearer to the model is `scale"),
        (FuseProjections(), QuantizeWeights(), Word.ORDERED, "`fuse-projections` first, because"),
        (QuantizeWeights(), FuseProjections(), Word.ORDERED, "`fuse-projections` first, because"),
        (Dense(), Dense(factor=2), Word.REFUSED, "dense packs the weights that dense must read"),
        (FuseProjections(), FuseProjections(), Word.REFUSED, "nothing to do after `fuse-"),
        (Lie(factor=2), Scale(), Word.FAILS, "VerifyError: lie promises exact results"),
    ],
    ids=str,
)  # fmt: skip
def test_every_class_is_told(
    model: Family, first: Scale, second: Scale, word: Word, why: str
) -> None:
    verdict = classify(model, first, second)
    assert verdict.word is word
    assert why in verdict.why
    assert not verdict.idle


def test_a_pass_with_nothing_to_do_says_nothing_of_the_pair(model: Family) -> None:
    nowhere = QuantizeWeights(include=("nowhere",))
    verdict = classify(model, nowhere, FuseProjections())
    assert (verdict.word, verdict.idle) == (Word.REFUSED, True)
    assert verdict.why.startswith('`quantize-weights{include=["nowhere"]}` finds nothing to do in')


def test_a_page_reads_as_it_was_written() -> None:
    a, b = Verdict(Word.COMMUTES, "they do"), Verdict(Word.FAILS, "`p{x=1}`: VerifyError: (3) | 1")
    found = {("p", "p{x=1}", "gpt"): a, ("p", "p{x=1}", "vit"): b}
    assert read(render(found, ["gpt", "vit"])) == found


def test_the_page_has_every_pair_and_no_failure() -> None:
    found = read(PAGE.read_text())
    names = columns()
    assert set(names) <= FAMILIES.keys()
    assert found.keys() == {(str(a), str(b), name) for name in names for a, b in cells()}, STALE
    assert [cell for cell, verdict in found.items() if verdict.word is Word.FAILS] == []


def test_a_sample_of_the_page_is_true() -> None:
    found, draw = read(PAGE.read_text()), random.Random(0)
    every = [(name, pair) for name in columns() for pair in cells()]
    for name, (a, b) in draw.sample(every, SIZE):
        assert found.get((str(a), str(b), name)) == classify(family(name), a, b), STALE


@pytest.mark.slow
@pytest.mark.parametrize("name", columns())
def test_the_page_is_true(name: str) -> None:
    text = PAGE.read_text()
    found = {cell: verdict for cell, verdict in read(text).items() if cell[2] == name}
    assert judge(name) == found, STALE
    assert render(read(text), columns()) == text, STALE
