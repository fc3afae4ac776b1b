"""A killed compile continues after the last certified pass."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.driver.instrument import Instruments
from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, OptionError
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import FoldConstants, FuseProjections, QuantizeWeights
from blockwright.passes.base import Pass

RECIPE = [
    FoldConstants(allow_no_match=True),
    FuseProjections(),
    QuantizeWeights(include=("*.up",)),
    QuantizeWeights(include=("*.down",), bits=4, group_size=4),
]
TEXT = 'fold-constants{allow_no_match=true}, fuse-projections, quantize-weights{include=["*.up"]}'
# Kills itself in the n-th call of a function that changes the disk.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import blockwright as bw
from blockwright.backends import disk
from blockwright.models.gpt import GPT, GPTConfig

folder, out, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def armed(function):
    def call(*args):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

for name in ("create", "write", "sync", "replace", "remove"):
    setattr(disk, name, armed(getattr(disk, name)))
torch.manual_seed(0)
model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)).eval()
tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
engine = bw.compile(model, sys.argv[4], (tokens,), backend="eager", checkpoint=folder)
engine.save(out)
print("calls", calls)
"""


class Notes:
    """Keeps what the manager says about checkpoints."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, title: str, text: str) -> None:
        if title == "checkpoint":
            self.said.append(text)


def compiled(
    program: Program, tokens: Tensor, folder: Path, passes: list[Pass[Any, Any]], **more: Any
) -> tuple[Program, list[bool], list[str]]:
    notes = Notes()
    new, steps = run_passes(program, passes, [[tokens]], checkpoint=folder,
                            instruments=Instruments(say=notes), **more)  # fmt: skip
    return new, [step.resumed for step in steps], notes.said


def same(one: Program, two: Program) -> bool:
    tensors = all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    return one.text() == two.text() and list(one.tensors) == list(two.tensors) and tensors


def test_what_is_done_is_not_done_again(program: Program, tokens: Tensor, tmp_path: Path) -> None:
    plain, steps = run_passes(program, RECIPE, [[tokens]])
    _, resumed, notes = compiled(program, tokens, tmp_path, RECIPE[:2])
    assert (resumed, notes) == ([False] * 2, [])
    whole, resumed, notes = compiled(program, tokens, tmp_path, RECIPE)
    assert resumed == [True, True, False, False]
    assert "continued after fold-constants, fuse-projections" in notes
    assert same(whole, plain)
    again, resumed, _ = compiled(program, tokens, tmp_path, RECIPE)
    assert resumed == [True] * 4
    assert same(again, plain)
    _, found = run_passes(program, RECIPE, [[tokens]], checkpoint=tmp_path)
    assert [step.to_json() for step in found] == [step.to_json() for step in steps]


def test_only_new_tensors_are_written(program: Program, tokens: Tensor, tmp_path: Path) -> None:
    new, *_ = compiled(program, tokens, tmp_path, RECIPE)
    blobs = list((tmp_path / "blobs").iterdir())
    old = {id(tensor) for tensor in program.tensors.values()}
    assert 0 < len(blobs) < len(new.tensors) * 2
    assert len(new.tensors) > sum(id(t) not in old for t in new.tensors.values())
    names = {path.name for path in blobs}
    compiled(program, tokens, tmp_path, RECIPE)
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == names


def test_a_change_of_recipe_keeps_what_is_shared(
    program: Program, tokens: Tensor, tmp_path: Path
) -> None:
    compiled(program, tokens, tmp_path, RECIPE)
    other = [*RECIPE[:2], QuantizeWeights(include=("*.down",))]
    new, resumed, notes = compiled(program, tokens, tmp_path, other)
    assert resumed == [True, True, False]
    assert notes[0] == "the recipe has changed; what it shares with the old one is kept"
    assert same(new, run_passes(program, other, [[tokens]])[0])
    assert len(list((tmp_path / "steps").iterdir())) == 3  # what is of no use is gone


@pytest.mark.parametrize("what", ["model", "inputs", "settings"])
def test_anything_else_starts_anew_and_says_why(
    program: Program, gpt: GPT, tokens: Tensor, tmp_path: Path, what: str
) -> None:
    compiled(program, tokens, tmp_path, RECIPE)
    more = {}
    if what == "model":
        torch.manual_seed(1)
        other = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)).eval()
        program = capture(other, (tokens,))
    elif what == "inputs":
        tokens = tokens.flip(0)
    else:
        more = {"seed": 5}
    _, resumed, notes = compiled(program, tokens, tmp_path, RECIPE, **more)
    assert not any(resumed)
    assert notes == [f"started anew, the checkpoint has other {what}"]


@pytest.mark.parametrize("where", ["blobs", "steps"])
def test_damage_is_found_and_repaired(
    program: Program, tokens: Tensor, tmp_path: Path, where: str
) -> None:
    compiled(program, tokens, tmp_path, RECIPE)
    for path in (tmp_path / where).iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    new, resumed, notes = compiled(program, tokens, tmp_path, RECIPE)
    assert not all(resumed)
    assert any("files are damaged" in note for note in notes)
    assert same(new, run_passes(program, RECIPE, [[tokens]])[0])
    assert all(compiled(program, tokens, tmp_path, RECIPE)[1])


def test_a_failed_compile_continues(program: Program, tokens: Tensor, tmp_path: Path) -> None:
    nowhere = QuantizeWeights(include=("nowhere",))
    with pytest.raises(bw.BlockwrightError):
        compiled(program, tokens, tmp_path, [*RECIPE[:2], nowhere])
    assert compiled(program, tokens, tmp_path, RECIPE)[1] == [True, True, False, False]


def test_other_files_stay(program: Program, tokens: Tensor, tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    for path in (tmp_path / "notes.txt", tmp_path / "steps" / "notes.txt"):
        path.write_text("mine")
    compiled(program, tokens, tmp_path, RECIPE)
    compiled(program, tokens.flip(0), tmp_path, RECIPE)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "steps" / "notes.txt").exists()


def test_what_cannot_be_kept_is_refused(program: Program, tmp_path: Path) -> None:
    meta = program.with_(tensors={n: t.to("meta") for n, t in program.tensors.items()})
    with pytest.raises(OptionError, match="a checkpoint needs weights"):
        run_passes(meta, RECIPE, checkpoint=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        run_passes(program, RECIPE, checkpoint=tmp_path / "file")


def launch(folder: Path, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder / "kept"), str(folder / "out"), str(at),
               TEXT]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def survives(gpt: GPT, tokens: Tensor, folder: Path, at: int, expected: dict[str, bytes]) -> None:
    """Kill a compile, finish it here, and compare what comes out, byte for byte."""
    folder.mkdir()
    killed = launch(folder, at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    engine = bw.compile(gpt, TEXT, (tokens,), backend="eager", checkpoint=folder / "kept")
    engine.save(folder / "out")
    assert files(folder) == expected


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_sigkill_is_survived(gpt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    bw.compile(gpt, TEXT, (tokens,), backend="eager").save(tmp_path / "out")
    survives(gpt, tokens, tmp_path / "killed", 60, files(tmp_path))


@pytest.mark.slow
def test_sigkill_at_fifty_points_is_survived(gpt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    done = launch(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    draw, calls, expected = random.Random(0), int(done.stdout.split()[-1]), files(tmp_path)
    for index in range(50):
        survives(gpt, tokens, tmp_path / str(index), draw.randint(1, calls), expected)
