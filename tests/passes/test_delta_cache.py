"""Blocks that are left out add what they added; which ones are, a table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.backends.engine import Engine, Session
from blockwright.backends.registry import get_backend
from blockwright.driver.manager import run_passes
from blockwright.ir.errors import NoMatchError, OptionError
from blockwright.ir.graphs import block_calls
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.models.dit import TOY, DiT
from blockwright.models.flux import TOY_FLUX, Flux
from blockwright.passes import DeltaCache

DEPTH, STEPS = 4, 8
Calls = list[tuple[Tensor, ...]]


def drawn(model: Any) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def dit() -> DiT:
    model: DiT = drawn(DiT(replace(TOY, depth=DEPTH)))
    return model


@pytest.fixture(scope="module")
def captured(dit: DiT) -> Program:
    return bw.capture(dit, dit.example_inputs())


@pytest.fixture(scope="module")
def inputs(dit: DiT) -> Calls:
    x, *others = dit.example_inputs()
    return [(x * (1 - 0.1 * k), *others) for k in range(STEPS)]


def cached(program: Program, **options: Any) -> Program:
    new, _ = run_passes(program, [DeltaCache(**{"steps": STEPS, "count": 1, **options})])
    return new


def session_of(program: Program, backend: str = "eager") -> Session:
    lowered = get_backend(backend).lower(program, {"threads": 1})
    return Engine(program, lowered, backend, {}).session()


def ran(session: Session, inputs: Calls) -> list[Tensor]:
    return [session(*call) for call in inputs]


def computed(program: Program, inputs: Calls) -> list[list[int]]:
    """Return which blocks are computed on each step, counted from 1."""
    state, found = program.initial_state(), list[list[int]]()
    for call in inputs:
        names: list[str] = []
        flat = program.arranged(call, state)
        results = run(program, flat, on_block=lambda name, _, names=names: names.append(name))
        state = {slot.name: results[slot.output] for slot in program.state}
        found.append([int(name.rpartition(".")[2]) + 1 for name in names])
    return found


def by_hand(dit: DiT, call: tuple[Tensor, ...], offset: Tensor, skipped: range) -> Tensor:
    """Return what the model gives with an offset in the place of some blocks, from 0."""
    keep = dit.blocks
    try:
        dit.blocks = nn.ModuleList(
            Added(offset if i == skipped.start else None) if i in skipped else block
            for i, block in enumerate(keep)
        )
        with torch.no_grad():
            found: Tensor = dit(*call)
    finally:
        dit.blocks = keep
    return found


class Added(nn.Module):
    def __init__(self, offset: Tensor | None) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x if self.offset is None else x + self.offset


def streams(program: Program, call: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the stream before each block and after the last."""
    found: list[Tensor] = []
    first = next(iter(block_calls(program.main).values()))

    def see(instance: str | None, node: object, value: Any) -> None:
        if node in first.args and isinstance(value, Tensor) and value.dim() == 3:
            found.append(value)

    run(program, call, on_node=see, on_block=lambda _, values: found.append(values[0]))
    return found


def test_golden(captured: Program, dit: DiT, golden: Callable[[str, str], None]) -> None:
    options = DeltaCache(steps=2, count=2, boundary=0)
    new, (step,) = run_passes(captured, [options], [list(dit.example_inputs())])
    golden("delta_cache", f"# {step.pass_}: {step.receipt}\n{new.text()}")


def test_which_blocks_are_computed_when(captured: Program, inputs: Calls) -> None:
    every = [1, 2, 3, 4]
    new = cached(captured, count=1, boundary=4)
    assert computed(new, inputs) == [every, [1, 2, 3], every, [1, 2, 3]] + [every, [2, 3, 4]] * 2
    new = cached(captured, count=1, boundary=4, stages="front-rear")
    assert computed(new, inputs) == [every, [2, 3, 4], every, [2, 3, 4]] + [every, [1, 2, 3]] * 2
    new = cached(captured, count=3, boundary=4, every=4)
    assert computed(new, inputs) == [every, [1], [1], [1], every, [4], [4], [4]]


@pytest.mark.parametrize(
    ("steps", "count", "depth", "blocks"),
    [(20, 21, 28, 350), (4, 4, 28, 104), (4, 6, 28, 100), (50, 4, 8, 300), (50, 6, 8, 250)],
)
def test_published_counts_of_blocks(steps: int, count: int, depth: int, blocks: int) -> None:
    """1.60, 1.08 and 1.12 times as fast: 560 / 350, 112 / 104, 112 / 100."""
    schedule = DeltaCache(steps=steps, count=count)
    columns = [schedule.column(block, depth) for block in range(1, depth + 1)]
    assert "".join(columns).count("1") == blocks


@pytest.mark.parametrize("value", ["offset", "output"])
def test_full_steps_change_no_bit(captured: Program, dit: DiT, inputs: Calls, value: str) -> None:
    found = ran(session_of(cached(captured, count=2, value=value)), inputs)
    with torch.no_grad():
        expected = [dit(*call) for call in inputs]
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, False] * 4
    with pytest.raises(NoMatchError, match="delta-cache changed nothing: it found no block"):
        cached(captured, every=1)


def test_an_offset_is_that_of_the_last_full_step(
    captured: Program, dit: DiT, inputs: Calls
) -> None:
    """Also across the boundary: step 3 is the first late one, and stands on an early full step."""
    found = ran(session_of(cached(captured, count=3, every=3, boundary=2)), inputs[:6])
    first, second = (streams(captured, inputs[step]) for step in (0, 3))
    rear, front = first[4] - first[1], [s[3] - s[0] for s in (first, second)]
    expected = {
        1: by_hand(dit, inputs[1], rear, range(1, 4)),
        2: by_hand(dit, inputs[2], front[0], range(3)),
        4: by_hand(dit, inputs[4], front[1], range(3)),
        5: by_hand(dit, inputs[5], front[1], range(3)),
    }
    for step, value in expected.items():
        torch.testing.assert_close(found[step], value, rtol=1e-4, atol=1e-5)


def test_a_cached_step_on_the_same_input_is_the_full_step_but_for_rounding(
    captured: Program, dit: DiT, inputs: Calls
) -> None:
    first, second = ran(session_of(cached(captured, count=3)), [inputs[0]] * 2)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value", "seen"), [("offset", True), ("output", False)])
def test_only_an_offset_lets_the_image_through(
    captured: Program, inputs: Calls, value: str, seen: bool
) -> None:
    """What comes out of a step without the front blocks, for two images."""
    session = session_of(cached(captured, stages="front", value=value, count=2))
    session(*inputs[0])
    state = session.state_dict()
    one = session(*inputs[1])
    session.reset()
    session(*inputs[0])
    assert all(torch.equal(state[name], value) for name, value in session.state_dict().items())
    other = session(*inputs[5])
    assert torch.equal(one, other) is not seen


def test_all_blocks_may_be_left_out(captured: Program, inputs: Calls) -> None:
    new = cached(captured, count=DEPTH, stages="rear")
    assert computed(new, inputs) == [[1, 2, 3, 4], []] * 4


def test_memory_is_one_stream_per_offset(captured: Program) -> None:
    stream = 2 * 16 * 8 * 4
    assert cached(captured, stages="rear").cost().state_bytes == stream + 4 * 8
    assert cached(captured).cost().state_bytes == 2 * (stream + 2 * 8) + 2 * 8


def test_a_run_after_reset_is_the_first_again(captured: Program, inputs: Calls) -> None:
    session = session_of(cached(captured))
    first = ran(session, inputs)
    session.reset()
    assert all(map(torch.equal, ran(session, inputs), first))


def test_both_streams_of_joint_blocks_are_kept() -> None:
    model = drawn(Flux(TOY_FLUX))
    example = model.example_inputs()
    program = bw.capture(model, example)
    new = cached(program, count=2, boundary=4)
    sizes = {n: tuple(v.shape) for n, v in new.initial_state().items() if ".value_" in n}
    image, text = example[0].shape[1], example[1].shape[1]
    fronts = {sizes[f"delta_cache.1_to_2.value_{i}"][2] for i in range(2)}
    assert fronts == {image, text}
    assert sizes["delta_cache.5_to_6.value_0"][2] == image + text
    session = session_of(new)
    with torch.no_grad():
        assert torch.equal(session(*example), model(*example))
    torch.testing.assert_close(session(*example), model(*example), rtol=1e-4, atol=1e-5)
    with pytest.raises(NoMatchError, match="gives values of other shapes than it takes"):
        cached(program, count=4, stages="rear")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_engines_agree(captured: Program, inputs: Calls, backend: str) -> None:
    new = cached(captured, count=2)
    found, expected = (ran(session_of(new, name), inputs) for name in (backend, "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range"),
        ({"count": 0}, "count=0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"boundary": 9}, "boundary=9 is out of range"),
        ({"stages": "middle"}, "stages=middle is not supported"),
        ({"value": "noise"}, "value=noise is not supported"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DeltaCache(**{"steps": 4, "count": 1, **options})
