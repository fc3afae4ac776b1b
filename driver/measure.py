"""Compare the speed of several ways to do one thing, on a machine that is not quiet.

    round 1: A B C     round 2: B C A     round 3: C A B     ...

Rounds are interleaved, so that a slow minute of the machine hits every candidate. Each round gives
one speed-up per candidate; the result is their median with a bootstrap interval. Fixed probes (a
matrix product, a read of memory) run before, between and after: when they disagree by more than a
quarter, the machine changed under the measurement and there is no verdict.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Clock = Callable[[], float]
NOISE_LIMIT = 1.25
MIN_ROUNDS = 5
SAMPLE_S = 0.02  # a sample repeats a faster call until it lasts this long


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Attributes:
        median_ms: Median time of one call.
        speedup: Time of the first candidate over time of this one, median over rounds: 2.0 is
            twice as fast as the first.
        interval: 90 % bootstrap interval of `speedup`.
        samples_ms: Time of one call, per round.
    """

    median_ms: float
    speedup: float
    interval: tuple[float, float]
    samples_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Timings of all candidates, the first of which is the yardstick.

    Attributes:
        timings: By name, in the order given.
        rounds: Rounds measured; fewer than asked when the budget ran out.
        noise: Slowest over fastest run of the probes; 1 on a quiet machine.
    """

    timings: Mapping[str, Timing]
    rounds: int
    noise: float

    @property
    def verdict(self) -> str:
        """`ok`, or `no verdict` when the numbers must not be used."""
        return "no verdict" if self.objection else "ok"

    @property
    def objection(self) -> str | None:
        """Why there is no verdict; None when there is one."""
        if self.noise > NOISE_LIMIT:
            return f"the machine's own speed changed {self.noise:.2f}x during the measurement"
        if self.rounds < MIN_ROUNDS:
            return f"only {self.rounds} of at least {MIN_ROUNDS} rounds fitted in the budget"
        return None

    @property
    def fastest(self) -> str:
        """Name of the candidate with the largest speed-up."""
        return max(self.timings, key=lambda name: self.timings[name].speedup)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        timings = {
            name: {
                "median_ms": timing.median_ms,
                "speedup": timing.speedup,
                "interval": list(timing.interval),
                "samples_ms": list(timing.samples_ms),
            }
            for name, timing in self.timings.items()
        }
        return {
            "verdict": self.verdict,
            "objection": self.objection,
            "rounds": self.rounds,
            "noise": self.noise,
            "fastest": self.fastest,
            "timings": timings,
        }


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    budget_s: float | None = None,
    clock: Clock = time.process_time,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure candidates against the first one, with torch on one thread.

    Args:
        candidates: Calls by name. Anything with threads of its own must be set up to use one.
            A call on a GPU must wait for the result.
        rounds: Rounds to measure, at least 5 for a verdict; 9 or more give a useful interval.
        budget_s: Wall-clock seconds after which no further round begins; None for no limit.
        clock: Seconds. CPU time of the process by default, which other processes hardly disturb;
            `time.perf_counter` for work outside the process's own CPU time.
        progress: Called with rounds done and rounds in all.

    Raises:
        ValueError: There is no candidate or no round.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"nothing to measure: {len(candidates)} candidates, rounds={rounds}")
    names, samples = list(candidates), {name: list[float]() for name in candidates}
    end = time.perf_counter() + (math.inf if budget_s is None else budget_s)
    with _steady():
        repeats = {name: _repeats(call, clock) for name, call in candidates.items()}
        probes = [_probe(clock)]
        done = 0
        for done in range(1, rounds + 1):
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(_sample(candidates[name], repeats[name], clock))
            if progress:
                progress(done, rounds)
            if done == rounds // 2:
                probes.append(_probe(clock))
            if time.perf_counter() >= end:
                break
        probes.append(_probe(clock))
    first = samples[names[0]]
    timings = {name: _timing(first, taken) for name, taken in samples.items()}
    noise = max(max(column) / min(column) for column in zip(*probes, strict=True))
    return Comparison(timings, done, noise)


def median_interval(
    values: Sequence[float], *, level: float = 0.9, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return a bootstrap interval of the median.

    Args:
        values: Independent measurements.
        level: Share of resampled medians inside the interval.
        draws: Resamples.
        seed: Seed of the resampling; equal seeds give equal intervals.
    """
    generator = np.random.default_rng(seed)
    medians = np.median(generator.choice(np.asarray(values), (draws, len(values))), axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _timing(first: Sequence[float], taken: Sequence[float]) -> Timing:
    speedups = [a / b for a, b in zip(first, taken, strict=True)]
    return Timing(
        median_ms=statistics.median(taken) * 1e3,
        speedup=statistics.median(speedups),
        interval=median_interval(speedups),
        samples_ms=tuple(seconds * 1e3 for seconds in taken),
    )


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """Run on one torch thread, without gradients and garbage collection."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def _repeats(call: Callable[[], object], clock: Clock) -> int:
    """Warm a call up, and count the calls that fill one sample."""
    call()
    return max(1, math.ceil(SAMPLE_S / _sample(call, 1, clock)))


def _sample(call: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Return seconds per call."""
    begin = clock()
    for _ in range(repeats):
        call()
    return max(clock() - begin, 1e-9) / repeats


def _probe(clock: Clock) -> tuple[float, float]:
    """Time a fixed matrix product and a read of 64 MiB; the best of five, as noise only adds."""
    matrix, memory = torch.ones(384, 384), torch.ones(1 << 24)
    product = [_sample(lambda: matrix @ matrix, 4, clock) for _ in range(5)]
    read = [_sample(memory.sum, 1, clock) for _ in range(5)]
    return min(product), min(read)
