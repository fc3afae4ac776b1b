"""The suite catches passes that are wrong: each mutant is a bug somebody could write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.ir.errors import VerifyError
from blockwright.passes import FuseProjections, QuantizeWeights, Skip
from blockwright.passes.fuse_projections import FusedLinear
from blockwright.testing import check_pass, pass_suite
from blockwright.testing.case import make_subject
from blockwright.testing.conformance import PROPERTIES, quick, search


@dataclass(frozen=True, kw_only=True)
class LosesBias(FuseProjections):
    """Forgets the biases."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        return FusedLinear(torch.cat([linear.weight for linear in region.linears]), None, sizes)


@dataclass(frozen=True, kw_only=True)
class SwapsHalves(FuseProjections):
    """Concatenates in another order than it splits."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        weight = torch.cat([linear.weight for linear in region.linears[::-1]])
        return FusedLinear(weight, None, sizes)


@dataclass(frozen=True, kw_only=True)
class LosesOneUnit(FuseProjections):
    """Drops the last of the weights."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        fused: Any = super().replace(region, sizes)
        fused.weight.data[-1, -1] = 0
        return fused


@dataclass(frozen=True, kw_only=True)
class WritesIntoTheModel(FuseProjections):
    """Scales the caller's weight in place and back again, which rounds."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        region.linears[0].weight.mul_(3.0).div_(3.0).add_(0.5)
        return super().replace(region, sizes)


@dataclass(frozen=True, kw_only=True)
class DrawsNumbers(FuseProjections):
    """Adds noise, from random numbers the manager keeps to the pass."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        fused: Any = super().replace(region, sizes)
        fused.weight.data += 1e-7 * torch.randn(fused.weight.shape).to(fused.weight)
        return fused


@dataclass(frozen=True, kw_only=True)
class ReadsNames(FuseProjections):
    """Looks for `attn` in the path."""

    def decide(self, region: Any) -> Any:
        return super().decide(region) if "attn" in region.label else Skip("is elsewhere", at=region)


@dataclass(frozen=True, kw_only=True)
class GivesNoReason(FuseProjections):
    """Skips without saying why."""

    def decide(self, region: Any) -> Any:
        first = "0" in region.label.split(".")
        return Skip("", at=region) if first else super().decide(region)


class Nested(nn.Module):
    """A layer that a second run finds again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.a, self.b = (nn.Parameter(torch.zeros_like(inner.weight)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        nothing = (F.linear(x, self.a) + F.linear(x, self.b)).sum(dim=-1, keepdim=True)
        return self.inner(x + nothing)


@dataclass(frozen=True, kw_only=True)
class NeverDone(FuseProjections):
    """Leaves something to do for a second run."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        return Nested(super().replace(region, sizes))


class MixesRows(nn.Module):
    """Normalises over the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x + 0 * x.mean(dim=0, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class LeaksRows(FuseProjections):
    """Lets rows of a batch see each other."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        return MixesRows(super().replace(region, sizes))


class AddsOthers(nn.Module):
    """Adds what the other rows are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x + x.sum(dim=0, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class SumsRows(FuseProjections):
    """Makes a row depend on the others."""

    def replace(self, region: Any, sizes: list[int]) -> nn.Module:
        return AddsOthers(super().replace(region, sizes))


@dataclass(frozen=True, kw_only=True)
class RaisesItsOwn(FuseProjections):
    """Refuses an option in a way nobody catches."""

    limit: int = 8

    def decide(self, region: Any) -> Any:
        if self.limit < 1:
            raise ValueError("limit")
        return super().decide(region)


@dataclass(frozen=True, kw_only=True)
class PromisesTooMuch(QuantizeWeights):
    """States a third of the bound."""

    def bound(self, region: Any, module: nn.Module, x: Tensor) -> Tensor | None:
        found = super().bound(region, module, x)
        return None if found is None else found / 3


@dataclass(frozen=True, kw_only=True)
class UntiesHeads(FuseProjections):
    """Fuses weights that other places read as well."""

    def decide(self, region: Any) -> Any:
        decision = super().decide(region)
        return [linear.weight.shape[0] for linear in region.linears] if decision else decision


MUTANTS = [
    (LosesBias(), "keeps_its_promise"),
    (LosesBias(), "is_exact_on_integers"),
    (SwapsHalves(), "is_exact_on_integers"),
    (LosesOneUnit(), "is_exact_on_integers"),
    (WritesIntoTheModel(), "leaves_its_input_alone"),
    (ReadsNames(), "ignores_names"),
    (GivesNoReason(), "has_an_honest_receipt"),
    (NeverDone(), "is_idempotent"),
    (LeaksRows(), "keeps_nan_in_its_row"),
    (SumsRows(), "keeps_rows_apart"),
    (RaisesItsOwn(), "refuses_bad_options"),
    (PromisesTooMuch(bits=4), "keeps_its_promise"),
    (UntiesHeads(), "keeps_ties"),
]


@pytest.mark.parametrize(
    ("mutant", "name"), MUTANTS, ids=[f"{type(m).__name__}-{name}" for m, name in MUTANTS]
)
def test_a_wrong_pass_is_caught(mutant: Any, name: str) -> None:
    (property_,) = (p for p in PROPERTIES if p.name == name)
    options = settings(quick(40), phases=[Phase.generate])  # found is enough
    with pytest.raises((AssertionError, ValueError, VerifyError)) as caught:
        search(property_, make_subject(mutant), options)
    assert f'replay({{"property": "{name}"' in "".join(caught.value.__notes__)


@pytest.mark.parametrize("name", ["is_deterministic", "leaves_its_input_alone"])
def test_random_numbers_of_a_pass_are_its_own(name: str) -> None:
    (property_,) = (p for p in PROPERTIES if p.name == name)
    search(property_, make_subject(DrawsNumbers()), quick(10))


def test_a_suite_has_a_test_for_every_property() -> None:
    suite = pass_suite(FuseProjections())
    tests = [name for name in vars(suite) if name.startswith("test_")]
    assert tests == [f"test_it_{p.name}" for p in PROPERTIES]
    assert all(vars(suite)[name].__doc__ for name in tests)


def test_check_pass_asks_every_property() -> None:
    check_pass(FuseProjections(), examples=2)
    with pytest.raises(AssertionError, match="a skip gives no reason"):
        check_pass(GivesNoReason(), examples=10)
