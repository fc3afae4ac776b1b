"""Passes declare state, replacements read and return it, sessions own it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockwright as bw
from blockwright.backends.engine import Engine
from blockwright.backends.registry import get_backend
from blockwright.driver.manager import run_passes
from blockwright.ir.arguments import with_argument
from blockwright.ir.errors import ArtefactError, OptionError, VerifyError
from blockwright.ir.program import Program
from blockwright.ir.recognize import FeedForward
from blockwright.ir.region_module import RegionModule
from blockwright.ir.regions import Region
from blockwright.ir.rewrite import rewrite
from blockwright.ir.run import run
from blockwright.ir.serialize import from_json, to_json
from blockwright.ir.state import State, shared, threaded, threads, with_state
from blockwright.ir.verify import verify
from blockwright.models.gpt import GPT

FAULTS = ("the third call is one too many.",)


class Remembering(nn.Module):
    """A region whose output is added to that of the call before."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.inner = RegionModule(region)

    def forward(self, x: Tensor, last: Tensor, calls: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y + last * calls, y


class Counting(nn.Module):
    def forward(self, calls: Tensor) -> tuple[Tensor, Tensor]:
        return calls + 1, (calls >= 2).to(torch.int64)


@pytest.fixture(scope="module")
def program(gpt: GPT, tokens: Tensor) -> Program:
    """State has fixed sizes, so the batch has one."""
    return bw.capture(gpt, (tokens,))


@pytest.fixture(scope="module")
def remembering(program: Program) -> Program:
    """Feed-forward networks that add what they gave on the call before; a counter in main."""
    return remember(program, program.feed_forwards())


def remember(program: Program, chosen: list[FeedForward]) -> Program:
    names = [str(region.instance) for region in chosen]
    shape = tuple(chosen[0].outputs[0].meta["val"].shape)
    states = [State("last", shape, instance=name) for name in names]
    counters = [State("calls", dtype=torch.int64), State("fault", dtype=torch.int64, faults=FAULTS)]
    prepared = shared(with_state(program, [*counters, *states]), "calls", names)
    verify(prepared)
    regions = [r for r in prepared.feed_forwards() if r.instance in names]
    places = [threaded(r, ("last", "calls"), ("last",)) for r in regions]
    main = threads(prepared)
    written = tuple(t.following for name in ("calls", "fault") if (t := main[name]).following)
    counting = Region(
        path="count",
        nodes=written,
        inputs=(main["calls"].current,),
        outputs=written,
        program=prepared,
    )
    modules: list[tuple[Region, nn.Module]] = [
        (place, Remembering(region)) for place, region in zip(places, regions, strict=True)
    ]
    new = rewrite(prepared, [*modules, (counting, Counting())], by="remember")
    verify(new)
    return new


def engine_of(program: Program, backend: str = "eager") -> Engine:
    return Engine(program, get_backend(backend).lower(program, {"threads": 1}), backend, {})


def test_what_is_declared_stays_as_it_is(program: Program, tokens: Tensor) -> None:
    name = next(iter(program.instances))
    states = [
        State("a", (2, 3), initial=0.5),
        State("b", dtype=torch.int64, initial=7, instance=name),
    ]
    new = with_state(program, states)
    verify(new)
    assert [slot.name for slot in new.state] == ["a", f"{name}.b"]
    assert len(new.graphs) == len(program.graphs) + 1  # the other blocks keep their class
    result, a, b = run(new, [tokens])
    assert torch.equal(result, run(program, [tokens])[0])
    assert torch.equal(a, torch.full((2, 3), 0.5))
    assert b.item() == 7
    assert new.tensors["a"].numel() == 1
    assert with_state(new, states) is new
    again = from_json(json.loads(json.dumps(to_json(new))), dict(new.tensors))
    assert again.text() == new.text()
    assert set(threads(again, name)) == {"b"}


def test_replacements_read_and_return_state(
    remembering: Program, program: Program, tokens: Tensor
) -> None:
    session = engine_of(remembering).session()
    first = session(tokens)
    assert torch.equal(first, run(program, [tokens])[0])
    assert not torch.equal(session(tokens), first)
    session.reset()
    assert torch.equal(session(tokens), first)


def test_only_some_instances_keep_state(program: Program, tokens: Tensor) -> None:
    new = remember(program, program.feed_forwards()[1:2])
    assert len({instance.block for instance in new.instances.values()}) == 2
    assert len(new.state) == 3
    assert torch.equal(run(new, [tokens])[0], run(program, [tokens])[0])


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_engines_agree(remembering: Program, tokens: Tensor, backend: str, tmp_path: Path) -> None:
    engine, eager = engine_of(remembering, backend), engine_of(remembering).session()
    engine.save(tmp_path / "model.bw")
    sessions = [engine.session(), bw.load(tmp_path / "model.bw").session()]
    for _ in range(2):
        expected = eager(tokens)
        for session in sessions:
            torch.testing.assert_close(session(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_fault_is_raised_and_the_state_is_kept(remembering: Program, tokens: Tensor) -> None:
    session = engine_of(remembering).session()
    session(tokens), session(tokens)
    before = session.state_dict()
    with pytest.raises(OptionError, match="the third call is one too many"):
        session(tokens)
    assert all(torch.equal(before[name], value) for name, value in session.state_dict().items())
    session.reset()
    session(tokens)


def test_sessions_in_threads_do_not_mix(remembering: Program, tokens: Tensor) -> None:
    engine = engine_of(remembering)
    alone = engine.session()
    expected = [alone(tokens), alone(tokens)]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        session = engine.session()
        found[number] = [session(tokens), session(tokens)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for values in found.values():
        assert all(map(torch.equal, values, expected))


def test_arguments_come_behind_state(program: Program, tokens: Tensor) -> None:
    new = with_argument(with_state(program, [State("a", (2,), initial=3.0)]), "step")
    completed = new.completed([tokens])
    assert [value.tolist() for value in completed[1:]] == [[3.0, 3.0], 0]


def test_a_name_that_is_taken_is_refused(remembering: Program, program: Program) -> None:
    with pytest.raises(OptionError, match="keeps something called 'calls' already"):
        with_state(remembering, [State("calls", dtype=torch.int64)])
    with pytest.raises(OptionError, match="no input 'nothing'"):
        shared(program, "nothing", [])


def test_blocks_that_are_left_out_on_some_calls_keep_no_state(
    program: Program, tokens: Tensor
) -> None:
    schedule = bw.SkipBricks(steps=2, masks=("111", "101"), stages="blocks")
    skipping, _ = run_passes(program, [schedule], [[tokens]])
    name = list(program.instances)[1]
    with pytest.raises(OptionError, match=f"{name} is computed on some calls only"):
        with_state(skipping, [State("a", instance=name)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": 99}, "has no initial value, no input or no output"),
        ({"name": "nothing"}, "has no initial value"),
        ({"output": 0}, "comes out as something else"),
        ({"faults": ("no number",)}, "tells of faults and is no number"),
    ],
)
def test_broken_state_is_found(program: Program, change: dict[str, Any], message: str) -> None:
    new = with_state(program, [State("a", (2,))])
    broken = new.with_(state=(replace(new.state[0], **change),))
    with pytest.raises(VerifyError, match=message):
        verify(broken)
    if "name" not in change:
        with pytest.raises(ArtefactError, match=message):
            from_json(to_json(broken), dict(new.tensors))
