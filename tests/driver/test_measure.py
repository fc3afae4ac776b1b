"""Comparisons: what they report, and when they refuse to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blockwright.driver import measure
from blockwright.driver.measure import Comparison, compare, median_interval


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(measure, "_probe", lambda clock: (1.0, 1.0))
    return Clock()


def test_speedup_is_against_the_first(clock: Clock) -> None:
    found = compare({"old": clock.work(0.04), "new": clock.work(0.01)}, clock=clock)
    assert (found.verdict, found.rounds, found.fastest) == ("ok", 9, "new")
    assert found.timings["old"].speedup == 1.0
    assert found.timings["new"].speedup == pytest.approx(4.0)
    assert found.timings["new"].interval == pytest.approx((4.0, 4.0))
    assert found.timings["new"].median_ms == pytest.approx(10.0)


def test_fast_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    calls = 0

    def quick() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.001

    compare({"quick": quick}, rounds=1, clock=clock)
    assert calls == 2 + 20  # warm-up and one trial, then 20 ms of calls


def test_rounds_rotate_the_order(clock: Clock) -> None:
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), clock.work(1.0)()) for name in "abc"}
    compare(calls, rounds=3, clock=clock)
    assert "".join(order[6:]) == "bcacababc"


def test_a_changing_machine_gives_no_verdict(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([(1.0, 1.0), (1.0, 1.3), (1.0, 1.0)])
    monkeypatch.setattr(measure, "_probe", lambda clock: next(probes))
    found = compare({"a": clock.work(0.1)}, clock=clock)
    assert found.verdict == "no verdict"
    assert found.objection == "the machine's own speed changed 1.30x during the measurement"


def test_a_spent_budget_gives_no_verdict(clock: Clock) -> None:
    found = compare({"a": clock.work(0.1)}, budget_s=0, clock=clock)
    assert (found.rounds, found.verdict) == (1, "no verdict")
    assert found.objection == "only 1 of at least 5 rounds fitted in the budget"


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure: 0 candidates, rounds=9"):
        compare({})


def test_interval_covers_the_median_and_repeats() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.2, 0.8, 1.0, 1.0]
    low, high = median_interval(values)
    assert 0.8 < low <= 1.0 <= high < 1.2
    assert (low, high) == median_interval(values)


def test_real_work_leaves_torch_as_it_was() -> None:
    threads, matrix = torch.get_num_threads(), torch.ones(64, 64)
    seen: list[tuple[int, int]] = []
    found = compare(
        {"one": lambda: matrix @ matrix, "four": lambda: [matrix @ matrix for _ in range(4)]},
        rounds=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.timings["four"].speedup < 1


def test_json_is_plain_data() -> None:
    timing = measure.Timing(2.0, 1.5, (1.4, 1.6), (2.0,))
    data = Comparison({"a": timing}, rounds=9, noise=1.1).to_json()
    assert data["timings"]["a"] == {
        "median_ms": 2.0,
        "speedup": 1.5,
        "interval": [1.4, 1.6],
        "samples_ms": [2.0],
    }
    assert (data["verdict"], data["objection"], data["fastest"]) == ("ok", None, "a")
