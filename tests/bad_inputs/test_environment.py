"""Disks, processes and machines that fail: entries 92 to 110 of docs/bad-inputs.md."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blockwright as bw
from blockwright.backends import archive, disk
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError
from blockwright.ir.program import Program

X = torch.linspace(-1, 1, 16).reshape(2, 8)
RECIPE = [bw.QuantizeWeights(include=("0",)), bw.QuantizeWeights(bits=4, include=("1",))]
STEPS = ("create", "write", "sync", "replace", "sync_folder", "remove")


@pytest.fixture(scope="module")
def layers() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (X,))


@pytest.fixture(scope="module")
def engine(layers: Program) -> bw.Engine:
    return bw.compile(layers, RECIPE, (X,), backend="eager")


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(patch: pytest.MonkeyPatch, at: int) -> Callable[[], bool]:
    """Let the `at`-th step on the disk fail; return whether there was one."""
    taken = itertools.count(1)
    reached = []

    def instead(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if next(taken) == at:
                reached.append(at)
                full()
            return step(*args)

        return run

    for name in STEPS:
        patch.setattr(disk, name, instead(getattr(disk, name)))
    return lambda: bool(reached)


def test_a_full_disk_at_every_step_of_a_checkpoint(layers: Program, tmp_path: Path) -> None:
    """Whatever step fails, the error is ours, and the next compile works and gives the same."""
    expected, _ = run_passes(layers, RECIPE, [[X]])
    for at in range(1, 200):
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            happened = failing(patch, at)
            with contextlib.suppress(ArtefactError):
                run_passes(layers, RECIPE, [[X]], checkpoint=folder)
        if not happened():
            break
        new, _ = run_passes(layers, RECIPE, [[X]], checkpoint=folder)
        assert new.text() == expected.text()
        assert list(folder.rglob(f"{disk.TEMPORARY}*")) == []
    assert at > 20


@pytest.mark.parametrize("name", ["model.bw", "model.zip"])
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write")
def test_a_read_only_target(engine: bw.Engine, name: str) -> None:
    with pytest.raises(ArtefactError, match="cannot write /proc/self/model"):
        engine.save(Path("/proc/self") / name)


@pytest.mark.parametrize("name", ["n" * 251 + ".zip", "n" * 255, "ü" * 100 + " .zip"])
def test_names_as_long_as_names_can_be(engine: bw.Engine, tmp_path: Path, name: str) -> None:
    engine.save(tmp_path / name)
    assert torch.equal(bw.load(tmp_path / name)(X), engine(X))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_room_for_temporary_files(
    engine: bw.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.save(tmp_path / "model.zip")
    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", full)
        with pytest.raises(ArtefactError, match=r"cannot write .*blockwright-.*No space left"):
            bw.load(tmp_path / "model.zip")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(ArtefactError, match="No space left"):
            bw.load(tmp_path / "model.zip")
    assert torch.equal(bw.load(tmp_path / "model.zip")(X), engine(X))


def test_a_clock_that_runs_backwards(
    layers: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2e9]

    def back() -> float:
        now[0] -= 1000
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, back)
    backwards = bw.compile(layers, RECIPE, (X,), backend="eager", checkpoint=tmp_path / "kept")
    backwards.save(tmp_path / "model.bw")
    assert torch.equal(bw.load(tmp_path / "model.bw")(X), backwards(X))


@pytest.mark.parametrize("threads", [1, 10**6])
def test_more_threads_than_cores_are_as_many_as_there_are(layers: Program, threads: int) -> None:
    options = {"threads": threads}
    compiled = bw.compile(layers, (), (X,), backend="onnxruntime", options=options)
    torch.testing.assert_close(compiled(X), bw.compile(layers, (), (X,), backend="eager")(X))


def together(count: int, work: Callable[[int], None]) -> list[int]:
    """Do the same in several processes at once; return their exit codes."""
    children = []
    for index in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                work(index)
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_compile_the_same(
    layers: Program, engine: bw.Engine, tmp_path: Path, count: int
) -> None:
    def work(index: int) -> None:
        made = bw.compile(layers, RECIPE, (X,), backend="eager", checkpoint=tmp_path / "kept")
        made.save(tmp_path / "model.bw")

    assert together(count, work) == [0] * count
    assert torch.equal(bw.load(tmp_path / "model.bw")(X), engine(X))
    assert len(list((tmp_path / "model.bw").iterdir())) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"model.bw", "kept"}


def test_processes_that_compile_different_things_in_one_place(
    layers: Program, tmp_path: Path
) -> None:
    def work(index: int) -> None:
        recipe = [bw.QuantizeWeights(bits=(4, 8)[index])]
        made = bw.compile(layers, recipe, (X,), backend="eager", checkpoint=tmp_path / "kept")
        made.save(tmp_path / f"{index}.bw")

    assert together(2, work) == [0, 0]
    bits = [bw.load(tmp_path / f"{i}.bw").record["steps"][0]["options"] for i in (0, 1)]
    assert bits == [{"bits": 4}, {}]


CAPPED = """
import resource, sys, torch
import blockwright as bw
from torch import nn

model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12)))  # 200 MB
program = bw.capture(model, (torch.ones(1, 2048),))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    engine = bw.compile(program, "quantize-weights", (torch.ones(1, 2048),), backend="eager")
    engine.save(sys.argv[1])
except (RuntimeError, MemoryError, bw.BlockwrightError):
    sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_half_the_memory_is_an_error_and_not_a_kill(engine: bw.Engine, tmp_path: Path) -> None:
    folder = tmp_path / "model.bw"
    engine.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, "-P", "-c", CAPPED, str(folder)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode in (0, 7), done.stderr
    if done.returncode:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
