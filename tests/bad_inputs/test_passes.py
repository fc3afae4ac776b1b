"""Bad options and calibrations: entries 77 to 91 of docs/bad-inputs.md."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.calibration import CERTIFIED_SETS
from blockwright.ir.errors import OptionError

X = torch.linspace(-1, 1, 16).reshape(2, 8)


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 2**70])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits} is not supported; use one of 4, 8"):
        bw.QuantizeWeights(bits=bits)
    with pytest.raises(OptionError, match="bits="):
        bw.compile(nn.Linear(8, 8), f"quantize-weights{{bits={bits}}}", (X,), backend="eager")


@pytest.mark.parametrize(
    "recipe",
    [
        "quantize-weights",
        "quantize-weights{symmetric=false}",
        "quantize-weights{bits=4, group_size=3}",
        'quantize-weights{activations="int8"}',
    ],
)
@pytest.mark.parametrize("kind", ["zeros", "constant", "outlier"])
def test_odd_weights_give_finite_results(recipe: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    with torch.no_grad():
        if kind == "outlier":
            model.weight[3, 3] = 1e30
        else:
            model.weight.fill_({"zeros": 0.0, "constant": 0.7}[kind])
    engine = bw.compile(model, recipe, (X,), backend="eager")
    assert engine(X).isfinite().all()
    if kind == "zeros":
        assert torch.equal(engine(X), model.bias.expand(2, 8))


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (torch.full((2, 8), torch.nan), "it holds NaN or infinity"),
        (torch.full((2, 8), torch.inf), "it holds NaN or infinity"),
        (X.double(), "float64"),
        (torch.zeros(2, 7), "7"),
        (X.to("meta"), "it is on meta, the model on cpu"),
        ((X, X), "was not captured"),
    ],
    ids=["NaN", "infinity", "type", "shape", "device", "count"],
)
def test_a_calibration_batch_that_does_not_fit_is_named(
    batch: Tensor | tuple[Tensor, ...], what: str
) -> None:
    with pytest.raises(OptionError, match=what) as caught:
        bw.compile(nn.Linear(8, 8), "quantize-weights", (X,), calibration=[X, batch],
                   backend="eager")  # fmt: skip
    assert caught.value.where == "calibration batch 1"


def test_a_calibration_without_end_is_read_to_a_point() -> None:
    endless = itertools.repeat((X,))
    model = nn.Linear(8, 8)
    engine = bw.compile(model, "quantize-weights", (X,), calibration=endless, backend="eager")
    assert engine.record["steps"][0]["certificate"]["inputs"] == 1 + CERTIFIED_SETS


def test_a_wrong_order_says_the_one_that_works() -> None:
    with pytest.raises(OptionError, match="put it after fuse-projections"):
        bw.compile(nn.Linear(8, 8), "quantize-weights, fuse-projections", (X,), backend="eager")
