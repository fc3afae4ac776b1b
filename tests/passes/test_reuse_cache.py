"""The plain caches: their rules, replayed in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.backends.engine import Engine, Session
from blockwright.backends.registry import get_backend
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import OptionError
from blockwright.ir.graphs import block_calls
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import TOY, DiT
from blockwright.passes import ReuseCache

STEPS = 10
Calls = list[tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(replace(TOY, depth=3)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def captured(dit: DiT) -> Program:
    return bw.capture(dit, dit.example_inputs())


@pytest.fixture(scope="module")
def inputs(dit: DiT) -> Calls:
    x, *others = dit.example_inputs()
    return [(x * math.cos(2 * math.sqrt(k)), *others) for k in range(STEPS)]


@pytest.fixture(scope="module")
def streams(captured: Program, inputs: Calls) -> list[list[Tensor]]:
    """The stream before each block and after the last, for each step."""
    first = next(iter(block_calls(captured.main).values()))
    place = next(n for n in first.args if isinstance(n, torch.fx.Node) and n.meta["val"].dim() == 3)
    found: list[list[Tensor]] = []
    for call in inputs:
        seen: dict[Any, Tensor] = {}
        blocks: list[Tensor] = []
        run(
            captured, call,
            on_node=lambda _, node, value, seen=seen: seen.setdefault(node, value),
            on_block=lambda _, values, blocks=blocks: blocks.append(values[0]),
        )  # fmt: skip
        found.append([seen[place], *blocks])
    return found


def session_of(program: Program, backend: str = "eager", **options: Any) -> Session:
    new, _ = run_passes(program, [ReuseCache(steps=STEPS, **options)])
    lowered = get_backend(backend).lower(new, {"threads": 1})
    return Engine(new, lowered, backend, {}).session()


def ran(session: Session, inputs: Calls) -> list[Tensor]:
    return [session(*call) for call in inputs]


def full(dit: DiT, found: list[Tensor], inputs: Calls) -> str:
    """Return `1` for each step that gave what the model gives, to the bit."""
    with torch.no_grad():
        pairs = zip(found, (dit(*call) for call in inputs), strict=True)
        return "".join("01"[torch.equal(*pair)] for pair in pairs)


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


def test_golden(captured: Program, dit: DiT, golden: Callable[[str, str], None]) -> None:
    options = ReuseCache(steps=4, when="first-block")
    new, (step,) = run_passes(captured, [options], [list(dit.example_inputs())])
    golden("reuse_cache", f"# {step.pass_}: {step.receipt}\n{new.text()}")


@pytest.mark.parametrize("value", ["offset", "output"])
def test_an_interval(captured: Program, dit: DiT, inputs: Calls, value: str) -> None:
    found = ran(session_of(captured, every=3, value=value), inputs)
    assert full(dit, found, inputs) == "1001001001"
    if value == "output":
        assert torch.equal(found[1], found[0])
    assert full(dit, ran(session_of(captured, every=1), inputs), inputs) == "1" * STEPS


def test_the_first_block_is_compared_with_the_last_computed_step(
    captured: Program, dit: DiT, inputs: Calls, streams: list[list[Tensor]]
) -> None:
    offsets = [blocks[1] - blocks[0] for blocks in streams]
    expected, kept = "1", offsets[0]
    threshold = sorted(change(b, a) for a, b in pairwise(offsets))[5]
    for offset in offsets[1:]:
        skip = change(offset, kept) < threshold
        expected += "01"[not skip]
        kept = kept if skip else offset
    found = ran(session_of(captured, when="first-block", threshold=threshold), inputs)
    assert full(dit, found, inputs) == expected
    assert 2 < expected.count("1") < STEPS
    off = session_of(captured, when="first-block", threshold=0.0)
    with pytest.warns(UserWarning, match="reuse_cache has taken no step"):
        assert full(dit, ran(off, inputs), inputs) == "1" * STEPS


@pytest.mark.parametrize("coefficients", [(), (0.5, 2.0, 0.01)])
def test_changes_of_the_input_add_up(
    captured: Program,
    dit: DiT,
    inputs: Calls,
    streams: list[list[Tensor]],
    coefficients: tuple[float, ...],
) -> None:
    changes = [change(b[0], a[0]) for a, b in pairwise(streams)]
    a, b, c = coefficients or (0.0, 1.0, 0.0)
    scores = [a * x * x + b * x + c for x in changes]
    threshold, expected, total = 0.45 * sum(scores), "1", 0.0
    for score in scores:
        total += score
        expected += "01"[total >= threshold]
        total = 0.0 if total >= threshold else total
    session = session_of(captured, when="input", threshold=threshold, coefficients=coefficients)
    assert full(dit, ran(session, inputs), inputs) == expected
    assert 1 < expected.count("1") < STEPS


def test_a_cached_step_adds_what_was_added(
    captured: Program, dit: DiT, inputs: Calls, streams: list[list[Tensor]]
) -> None:
    """With an interval of 2, step 1 is the head on its own stream plus the offset of step 0."""
    found = ran(session_of(captured), inputs[:2])
    kept = dit.blocks
    try:
        dit.blocks = nn.ModuleList([Plus(streams[0][-1] - streams[0][0])])
        with torch.no_grad():
            expected = dit(*inputs[1])
    finally:
        dit.blocks = kept
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


class Plus(nn.Module):
    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.offset


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_engines_agree(captured: Program, inputs: Calls, backend: str) -> None:
    options = {"when": "input", "threshold": 0.5}
    found, expected = (ran(session_of(captured, b, **options), inputs) for b in (backend, "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"threshold": -0.1}, "threshold=-0.1 is out of range"),
        ({"warmup": -1}, "warmup=-1 is out of range"),
        ({"when": "luck"}, "when=luck is not supported"),
        ({"value": "noise"}, "value=noise is not supported"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ReuseCache(**{"steps": 4, **options})
