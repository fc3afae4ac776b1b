"""QuantizeWeights by what layers read: GPTQ, AWQ, and bits shared out under a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.passes import QuantizeWeights
from blockwright.passes.base import Promise
from blockwright.passes.shared.awq import scales_of
from blockwright.passes.shared.bits import Form, Measured, forms_of, ladder, shared_out
from blockwright.passes.shared.codes import Codes, Grid, rounded
from blockwright.passes.shared.gptq import gptq
from blockwright.passes.shared.moments import Moments

FEATURES, OUTPUTS = 24, 10


def correlated(seed: int, count: int = 400) -> Tensor:
    """Inputs of a few directions and some noise, as those of real layers are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(count, FEATURES, generator=generator)
    return torch.randn(count, 6, generator=generator) @ mixing + 0.3 * noise


def seen(x: Tensor) -> Moments:
    moments = Moments.none(x.shape[-1])
    moments.add(x)
    return moments


def columns() -> Tensor:
    return torch.randn(FEATURES, OUTPUTS, generator=torch.Generator().manual_seed(5))


def off(x: Tensor, codes: Tensor, grid: Grid) -> float:
    """How far a layer over codes is off on held-out inputs."""
    change = grid.values(codes, grid.groups(FEATURES)) - columns()
    return float((x @ change).square().mean())


def slow_gptq(w: Tensor, second: Tensor, grid: Grid, order: list[int], damping: float) -> Tensor:
    """Take inputs one by one; those left make up for the error by least squares, in fp64."""
    w, codes = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    damped = second + damping * second.diagonal().mean() * torch.eye(len(w), dtype=torch.float64)
    for place, i in enumerate(order):
        rest, group = order[place + 1 :], grid.groups(len(w))[i : i + 1]
        codes[i] = grid.nearest(w[i : i + 1], group)[0]
        error = w[i] - grid.values(codes[i : i + 1], group)[0]
        if rest:  # argmin over d of |x_i * error - x_rest @ d|^2
            best = torch.linalg.solve(damped[rest][:, rest], damped[rest, i])
            w[rest] += best[:, None] * error
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, FEATURES), (4, 7), (3, 8), (3, FEATURES)])
def test_gptq_agrees_with_the_slow_way_and_beats_rounding(
    bits: int, group_size: int, act_order: bool
) -> None:
    moments, w = seen(correlated(1)), columns()
    for symmetric in (True, False):
        grid = Grid.around(w, bits, group_size, symmetric)
        sizes = moments.second.diagonal()
        order = sizes.argsort(descending=True, stable=True).tolist()
        order = order if act_order else list(range(FEATURES))
        found = gptq(w, moments.second, grid, act_order=act_order, block=5)
        assert torch.equal(found.double(), slow_gptq(w, moments.second, grid, order, 0.01))
        held_out = correlated(2)
        assert off(held_out, found, grid) < 0.8 * off(held_out, rounded(w, grid), grid)


def test_gptq_rounds_what_is_never_read() -> None:
    x, w = correlated(1), columns()
    x[:, 3] = 0
    grid = Grid.around(w, 4, 8, True)
    assert torch.equal(gptq(w, seen(x).second, grid)[3], rounded(w, grid)[3])
    nothing = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    assert torch.equal(gptq(w, nothing, grid), rounded(w, grid))


def test_awq_protects_the_inputs_that_are_large() -> None:
    x, codes = correlated(1), Codes(4, FEATURES, True)
    x[:, [2, 11]] *= 30
    scales = scales_of([(columns(), codes)], seen(x))
    assert scales[[2, 11]].min() > 1.5 * scales[[0, 1, 3, 4]].max()
    held_out = correlated(2)
    held_out[:, [2, 11]] *= 30
    grid = Grid.around(columns() * scales[:, None], 4, FEATURES, True)
    values = grid.values(rounded(columns() * scales[:, None], grid), grid.groups(FEATURES))
    awq = float((held_out / scales @ values - held_out @ columns()).square().mean())
    plain = Grid.around(columns(), 4, FEATURES, True)
    assert awq < 0.3 * off(held_out, rounded(columns(), plain), plain)


class Outliers(nn.Module):
    """Two networks; in the stream that the first norm reads, two channels are large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24)
        self.down, self.head = nn.Linear(24, 16), nn.Linear(16, 6)
        with torch.no_grad():
            self.norm.weight[[3, 9]] = 10.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(self.down(torch.relu(self.gate(h)) * self.up(h)))


def outliers() -> tuple[Program, list[list[Tensor]], list[Tensor]]:
    """A program, its calibration, and inputs it was not calibrated on."""
    torch.manual_seed(0)
    mixing = torch.randn(5, 16)
    inputs = [torch.randn(64, 5) @ mixing + 0.3 * torch.randn(64, 16) for _ in range(6)]
    model = Outliers().eval()
    return capture(model, (inputs[0],)), [[x] for x in inputs[:5]], [inputs[5]]


def apart(new: Program, old: Program, inputs: list[Tensor]) -> float:
    truth = run(old, inputs)[0]
    return float((run(new, inputs)[0] - truth).norm() / truth.norm())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_codes_lose_less(method: str) -> None:
    program, sets, held_out = outliers()
    errors = {}
    for name in ("rtn", method):
        quantize = QuantizeWeights(bits=4, method=name)
        new, (step,) = run_passes(program, [quantize], sets[:1], calibration=sets)
        errors[name] = apart(new, program, held_out)
    assert errors[method] < 0.8 * errors["rtn"]
    assert step.certificate is not None
    assert step.certificate.bound is None  # only rounding to nearest has one
    assert step.to_json()["promise"] == "approximate"


def test_awq_divides_in_the_norm_where_it_can() -> None:
    program, sets, _ = outliers()
    quantize = QuantizeWeights(bits=4, method="awq")
    new, (step,) = run_passes(program, [quantize], sets[:1], calibration=sets)
    by = {label: codes.smoothing for label, codes in step.plan.decisions.items()}
    assert by == {"up": "norm", "gate": "norm", "down": "factor", "head": "factor"}
    assert set(new.tensors) >= {"down.factor", "head.factor"}
    assert "up.factor" not in new.tensors
    ratio = program.tensors["norm.weight"] / new.tensors["norm.weight"]
    assert ratio[[3, 9]].min() > ratio.median()  # so much the weights have grown
    torch.testing.assert_close(
        program.tensors["norm.bias"] / ratio, new.tensors["norm.bias"], rtol=1e-5, atol=1e-7
    )


def test_a_plan_is_calibrated_again() -> None:
    program, sets, _ = outliers()
    for method in ("gptq", "awq"):
        quantize = QuantizeWeights(bits=4, group_size=8, method=method)
        first, (step,) = run_passes(program, [quantize], sets[:1], calibration=sets)
        again, _ = run_passes(
            program, [quantize], sets[:1], calibration=sets, plans=[step.plan.to_json()]
        )
        assert first.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(t, again.tensors[name]) for name, t in first.tensors.items())


def test_a_plan_that_cannot_fold_is_refused() -> None:
    program, sets, _ = outliers()
    quantize = QuantizeWeights(bits=4, method="awq", include=("down",))
    data = {"decisions": {"down": {"bits": 4, "group_size": 24, "symmetric": True,
                                   "smoothing": "norm"}}}  # fmt: skip
    with pytest.raises(OptionError, match="come from no norm"):
        run_passes(program, [quantize], sets[:1], calibration=sets, plans=[data])


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "awq"}, {"budget_bits": 5.0}])
def test_needs_calibration(options: dict[str, Any]) -> None:
    program, sets, _ = outliers()
    with pytest.raises(OptionError, match="calibration inputs, and there are none"):
        run_passes(program, [QuantizeWeights(**options)])
    broken = [[sets[0][0].clone()]]
    broken[0][0][0] = torch.nan
    with pytest.raises(OptionError, match="NaN or infinity on the calibration"):
        run_passes(program, [QuantizeWeights(**options)], sets[:1], calibration=broken)


def test_forms_on_a_ladder_are_worth_less_and_less() -> None:
    sizes = [(10, 8.0), (20, 7.9), (30, 2.0), (40, 1.5), (50, 1.6), (60, 0.0)]
    steps = ladder([Form(None, size, error) for size, error in sizes])
    assert [step.size_bytes for step in steps] == [10, 30, 60]
    assert [step.error for step in steps] == [8.0, 2.0, 0.0]


def test_bytes_go_where_they_take_most_error_away() -> None:
    def steps(*errors: float) -> list[Form]:
        return [Form(None, 10 * (i + 1), error) for i, error in enumerate(errors)]

    forms = {"a": steps(8.0, 4.0, 3.0), "b": steps(9.0, 2.0), "c": steps(1.0, 0.5)}
    sizes = {30: (10, 10, 10), 40: (10, 20, 10), 50: (20, 20, 10), 60: (30, 20, 10)}
    for budget, expected in sizes.items():
        chosen = shared_out(forms, budget)
        assert tuple(form.size_bytes for form in chosen.values()) == expected
    with pytest.raises(OptionError, match=r"take 30 bytes, the budget is 29.*"):
        shared_out(forms, 29)


def test_forms_scale_with_what_they_round_away() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    floats, coarsest, *forms = forms_of(Measured(weight, 0.5, 4), True)
    assert coarsest.error == pytest.approx(0.5)
    assert coarsest.size_bytes == 8 * 64 // 2 + 8 * 4
    eight = next(form for form in forms if form.codes is not None and form.codes.bits == 8)
    assert eight.error == pytest.approx(0.5 * (7 / 127) ** 2, rel=0.2)
    assert floats == Form(None, 8 * 64 * 4, 0.0)


def test_mixed_bits_beat_uniform_ones_of_the_same_size() -> None:
    program, sets, held_out = outliers()
    even, (uniform,) = run_passes(program, [QuantizeWeights(bits=4, group_size=8)], sets[:1])
    weights = sum(t.numel() for n, t in program.tensors.items() if t.dim() == 2)
    stored = uniform.receipt.bytes[1] - sum(
        t.nbytes for t in program.tensors.values() if t.dim() == 1
    )
    budget = 8 * stored / weights
    mixed, (step,) = run_passes(
        program, [QuantizeWeights(budget_bits=budget)], sets[:1], calibration=sets
    )
    assert step.receipt.bytes[1] <= uniform.receipt.bytes[1]
    assert apart(mixed, program, held_out) < apart(even, program, held_out)
    assert all(codes.sensitivity > 0 for codes in step.plan.decisions.values())
    assert step.certificate is not None
    assert step.certificate.bound is not None  # codes are the nearest ones


def test_a_large_budget_keeps_floats() -> None:
    program, sets, _ = outliers()
    quantize = QuantizeWeights(budget_bits=20)
    _, (step,) = run_passes(program, [quantize], sets[:1], calibration=sets)
    assert set(step.receipt.skipped.values()) == {"stays as it is, which the budget allows"}
    small = sum(t.nbytes for t in program.tensors.values() if t.dim() == 1)
    assert step.receipt.bytes[1] - small <= 20 / 8 * (16 * 24 * 3 + 16 * 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method=best is not supported"),
        ({"damping": 0.0}, "damping=0.0 is out of range"),
        ({"budget_bits": 4}, "budget_bits=4 is out of range"),
        ({"budget_bits": 5.0, "bits": 4}, "budget_bits chooses bits and group_size itself"),
        ({"method": "gptq", "activations": "int8"}, "activations=int8 needs method=rtn"),
        ({"budget_bits": 9.0, "activations": "int8"}, "activations=int8 needs method=rtn"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeWeights(**options)


def test_promises_less_without_rounding_to_nearest() -> None:
    assert QuantizeWeights(bits=4).promised() is Promise.BOUNDED
    assert QuantizeWeights(bits=4, method="gptq").promised() is Promise.APPROXIMATE
    assert str(bw.QuantizeWeights(method="awq")) == 'quantize-weights{method="awq"}'
