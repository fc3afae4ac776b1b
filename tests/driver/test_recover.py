"""Recovery trains what is named, repeats bit by bit, survives kills, and works in processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blockwright as bw
from blockwright.driver import student as student_file
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover, Training, recover
from blockwright.driver.recover_loop import pace
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, OptionError, RecoveryError
from blockwright.ir.program import Program
from blockwright.ir.recognize.place import Place
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import DropBlocks, FuseBlocks
from blockwright.passes.shared.losses import output_mse, pairs
from blockwright.passes.shared.recovery import Stage

CONFIG = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)
NAMES = ("blocks.0.up.weight", "blocks.2.down.bias")
Sets = list[list[Tensor]]
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def old() -> Program:
    torch.manual_seed(0)
    return capture(GPT(CONFIG).eval(), (torch.zeros(2, 8, dtype=torch.int64),))


@pytest.fixture(scope="module")
def new(old: Program) -> Program:
    return run_passes(old, [DropBlocks(blocks=(1,))])[0]


@pytest.fixture(scope="module")
def sets() -> Sets:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(0, 32, (2, 8), generator=generator)] for _ in range(6)]


@pytest.fixture(scope="module")
def stage(old: Program, new: Program) -> Stage:
    return Stage(
        name="distil", weights=dict.fromkeys(NAMES), loss=output_mse(old, new), epochs=2, rate=1e-2
    )


@pytest.fixture(scope="module")
def train(
    old: Program, new: Program, stage: Stage, sets: Sets
) -> Callable[..., tuple[Program, Training]]:
    def trained(options: Recover | None = None, **changes: Any) -> tuple[Program, Training]:
        say = changes.pop("say", None)
        given = changes.pop("sets", sets)
        changed = dataclasses.replace(stage, **changes)
        found, (training,) = recover(old, new, [changed], given, options or Recover(), say=say)
        return found, training

    return trained


Train = Callable[..., tuple[Program, Training]]


def same(a: Program, b: Program) -> bool:
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


# What is trained.


def test_only_the_named_weights_move(train: Train, new: Program) -> None:
    trained, training = train()
    moved = {n for n, t in new.tensors.items() if not torch.equal(t, trained.tensors[n])}
    assert moved == set(NAMES)
    assert trained.graphs is new.graphs
    assert training.kept
    assert training.after < training.before
    assert (training.steps, training.parameters) == (12, 12 * 8 + 8)


def test_trains_where_the_caller_wants_no_gradients(train: Train) -> None:
    with torch.no_grad():
        found, _ = train()
    assert same(found, train()[0])


def test_weights_the_loss_does_not_depend_on_stay(train: Train, old: Program, new: Program) -> None:
    ours, theirs = ([Place(b.instance, b.stream_out)] for b in (new.blocks()[0], old.blocks()[1]))
    trained, training = train(loss=pairs(ours, theirs))
    assert training.parameters == 12 * 8
    assert torch.equal(trained.tensors[NAMES[1]], new.tensors[NAMES[1]])


def test_a_loss_without_weights_is_refused(train: Train, old: Program, new: Program) -> None:
    ours, theirs = ([Place(b.instance, b.stream_out)] for b in (new.blocks()[0], old.blocks()[1]))
    with pytest.raises(OptionError, match="depends on none of its weights"):
        train(weights={NAMES[1]: None}, loss=pairs(ours, theirs))
    with pytest.raises(OptionError, match=r"no tensor 'blocks.1.up.weight'"):
        train(weights={"blocks.1.up.weight": None})


def test_a_training_that_ends_worse_is_thrown_away(train: Train, new: Program) -> None:
    trained, training = train(Recover(steps=1, rate=1e3))
    assert training.after > training.before
    assert not training.kept
    assert same(trained, new)


def test_steps_and_rate(train: Train) -> None:
    assert train(Recover(steps=5))[1].steps == 5
    assert train(batch=2)[1].steps == 6
    slow, fast = train(Recover(rate=1e-3))[1], train(Recover(rate=1.0))[1]
    assert slow.before == fast.before
    assert fast.after < slow.after < slow.before


def test_rates_by_name(train: Train, new: Program) -> None:
    frozen = {"value": 1e-30}
    trained, _ = train(rates=frozen)
    assert torch.allclose(trained.tensors[NAMES[0]], new.tensors[NAMES[0]], atol=1e-6)


def test_pace() -> None:
    assert [pace(step, 4, 0.0) for step in range(4)] == pytest.approx(
        [1, 0.8536, 0.5, 0.1464], abs=1e-4
    )
    assert [pace(step, 6, 0.5) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_progress(train: Train) -> None:
    said: list[tuple[str, int, int]] = []
    train(Recover(steps=3), say=lambda *about: said.append(about))
    assert said == [("recover: distil", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"rate": 0.0}, {"every": 0}, {"features": "memory"}]
)
def test_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Recover(**options)


# The same again.


def test_equal_seeds_give_equal_weights(train: Train) -> None:
    torch.rand(3)
    first = train()[0]
    torch.rand(5)
    assert same(first, train()[0])


class Noisy(nn.Module):
    """A weight that draws numbers while it is trained."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(tensor.clone())

    def forward(self) -> Tensor:
        return self.value * (1 + 0.1 * torch.rand(())) if torch.is_grad_enabled() else self.value


def test_other_seeds_draw_other_numbers(train: Train, new: Program) -> None:
    def noisy(seed: int) -> Program:
        return train(Recover(seed=seed), weights={NAMES[0]: Noisy(new.tensors[NAMES[0]])})[0]

    assert same(noisy(0), noisy(0))
    assert not same(noisy(0), noisy(1))


def test_features_from_disk_are_those_of_the_teacher(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = train()[0]
    written: list[Path] = []
    replace_file = student_file.disk.replace_file
    monkeypatch.setattr(
        student_file.disk, "replace_file", lambda p, c: (written.append(p), replace_file(p, c))
    )
    assert same(train(Recover(features="disk"))[0], streamed)
    assert len(set(written)) == len(written) == 6  # each calibration set once
    assert not any(path.exists() for path in written)


# Checkpoints.


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def say(_: str, done: int, total: int) -> None:
        if done == step:
            raise Stop

    return say


def test_goes_on_at_its_step(train: Train, tmp_path: Path) -> None:
    options = Recover(checkpoint=tmp_path / "state", every=2)
    with pytest.raises(Stop):
        train(options, say=stop_at(5))
    said: list[int] = []
    resumed = train(options, say=lambda _, done, total: said.append(done))[0]
    assert said == list(range(5, 13))
    assert same(resumed, train()[0])


def test_a_finished_training_is_not_repeated(train: Train, tmp_path: Path) -> None:
    options = Recover(checkpoint=tmp_path)
    first = train(options)[0]
    said: list[int] = []
    assert same(first, train(options, say=lambda _, done, total: said.append(done))[0])
    assert not said


@pytest.mark.parametrize(
    "changes", [{"epochs": 1}, {"batch": 2}, {"rate": 2e-2}, {"clip": None}, {"sets": "reversed"}]
)
def test_another_training_has_a_file_of_its_own(
    train: Train, sets: Sets, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "sets" in changes:
        changes = {"sets": sets[::-1]}
    train(Recover(checkpoint=tmp_path))
    assert same(train(Recover(checkpoint=tmp_path), **changes)[0], train(**changes)[0])


def test_a_damaged_checkpoint_is_ignored(train: Train, tmp_path: Path) -> None:
    options = Recover(checkpoint=tmp_path)
    first = train(options)[0]
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert same(train(options)[0], first)


def test_a_folder_that_cannot_be_made_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="file"):
        train(Recover(checkpoint=tmp_path / "file" / "folder"))


SCRIPT = """
import os, sys, time
import torch
import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.recover import Recover
from blockwright.models.gpt import GPT, GPTConfig
from safetensors.torch import save_file

out, checkpoint, pause, batch = sys.argv[1:]
torch.manual_seed(0)
config = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=5, ffn_dim=12)
program = bw.capture(GPT(config).eval(), (torch.zeros(2, 8, dtype=torch.int64),))
sets = [[torch.randint(0, 32, (2, 8))] for _ in range(4)]


class Fuse(bw.FuseBlocks):
    def recovery(self, old, new, plan):
        import dataclasses
        return [dataclasses.replace(s, batch=int(batch)) for s in super().recovery(old, new, plan)]


def say(what, done, total):
    print(what, done, total, flush=True)
    time.sleep(float(pause))


fuse = Fuse(blocks=("blocks.3.block", "blocks.1.block"), group=4, rank=2, epochs=3, base_rate=1e-3)
options = Recover(checkpoint=checkpoint or None, every=1)
new, _ = run_passes(program, [fuse], calibration=sets, recover=options, progress=say)
rank = os.environ.get("RANK", "0")
save_file({n: t.contiguous() for n, t in new.tensors.items()}, f"{out}.{rank}")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def call(script: Path, out: Path, checkpoint: Path | str = "", batch: int = 1) -> Weights:
    subprocess.run(
        [sys.executable, script, out, checkpoint, "0", str(batch)], check=True, capture_output=True
    )
    return load_file(f"{out}.0")


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_weights(script: Path, tmp_path: Path) -> None:
    whole = call(script, tmp_path / "whole")
    command = [sys.executable, script, tmp_path / "killed", tmp_path / "state", "0.2", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _wait_for(process, "blocks.1.block 5 12")  # in the second round
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("killed*"))
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 2
    assert equal(call(script, tmp_path / "resumed", tmp_path / "state"), whole)


def _wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError("the training ended before it was killed")


# Several processes.


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(script: Path, tmp_path: Path) -> None:
    one = call(script, tmp_path / "one", batch=2)
    launch(script, tmp_path / "two", "", "0", "1")
    first, second = (load_file(tmp_path / f"two.{rank}") for rank in (0, 1))
    assert equal(first, second)
    for name, tensor in one.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def launch(script: Path, *arguments: object) -> None:
    """Start two processes; on a machine without GPUs they talk by gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--main_process_port=0", str(script), *map(str, arguments)]
    found = subprocess.run(
        command, check=False, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]


SHARDED = """
import sys
import torch
from pathlib import Path
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import blockwright as bw
from blockwright.driver.manager import run_passes
from blockwright.driver.student import Student, Teacher
from blockwright.driver.training_state import TrainingState
from blockwright.models.gpt import GPT, GPTConfig

folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
config = GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=4, ffn_dim=12)
old = bw.capture(GPT(config).eval(), (torch.zeros(2, 8, dtype=torch.int64),))
sets = [[torch.randint(0, 32, (2, 8))] for _ in range(4)]
fuse = bw.FuseBlocks(blocks=("blocks.2.block",), group=4, rank=2)
new, (step,) = run_passes(old, [fuse])


def begin(shard, folder):
    torch.manual_seed(1)
    (stage,) = fuse.recovery(old, new, step.plan)
    student, teacher = Student(new, stage), Teacher(old, stage)
    if shard:
        fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    return student, teacher, optimizer, TrainingState.at(folder, [], student, optimizer)


def train(student, teacher, optimizer, state, steps):
    for number in steps:
        mine = sets[2 * number :][:2]
        mine = mine[rank : rank + 1] if hasattr(student, "unshard") else mine
        for inputs in mine:
            wanted, given = teacher(inputs)
            (student(inputs, given, wanted) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state.save(number + 1, write=rank == 0)
    return student.tensors()


whole = train(*begin(False, None), range(2))
train(*begin(True, folder), range(1))
distributed.barrier()
again = begin(True, folder)
assert again[-1].restore() == 1
resumed = train(*again, range(1, 2))
for name, tensor in whole.items():
    torch.testing.assert_close(resumed[name], tensor, msg=name)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_weights_dealt_out_to_processes_train_alike(tmp_path: Path) -> None:
    """FSDP2 itself: accelerate shards on accelerators alone, and copies on the CPU."""
    path = tmp_path / "sharded.py"
    path.write_text(SHARDED)
    launch(path, tmp_path / "state")


# What goes wrong.


class Broken(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(tensor.clone())

    def forward(self) -> Tensor:
        return self.value * float("nan") if torch.is_grad_enabled() else self.value


def test_a_loss_of_nan_leaves_the_program_alone(train: Train, new: Program) -> None:
    before = {name: tensor.clone() for name, tensor in new.tensors.items()}
    with pytest.raises(RecoveryError, match=r"distil: the loss is nan at step 0"):
        train(weights={NAMES[0]: Broken(new.tensors[NAMES[0]])})
    assert all(torch.equal(new.tensors[name], tensor) for name, tensor in before.items())


def test_nothing_to_train_on(train: Train) -> None:
    with pytest.raises(RecoveryError, match="has 0 calibration sets"):
        train(sets=[])


# Weights from a file.


@pytest.fixture(scope="module")
def fused(old: Program, sets: Sets) -> Program:
    fuse = [FuseBlocks(blocks=("blocks.1.block",), rank=2)]
    return run_passes(old, fuse, calibration=sets, recover=Recover(steps=3))[0]


def taken(old: Program, sets: Sets, path: Path, **options: Any) -> tuple[Program, Training]:
    fuse = FuseBlocks(**{"blocks": ("blocks.1.block",), "rank": 2, **options})
    new, (step,) = run_passes(old, [fuse], calibration=sets, recover=Recover(weights=path))
    return new, step.receipt.trained[0]


def test_weights_of_safetensors(old: Program, fused: Program, sets: Sets, tmp_path: Path) -> None:
    save_file({n: t.contiguous() for n, t in fused.tensors.items()}, tmp_path / "w.safetensors")
    new, training = taken(old, sets, tmp_path / "w.safetensors")
    assert same(new, fused)
    assert (training.steps, training.parameters, training.missing) == (0, 0, ())
    assert training.before == training.after > 0


def test_weights_of_an_engine(old: Program, sets: Sets, tmp_path: Path) -> None:
    fuse = [FuseBlocks(keep_ratio=0.4, rank=2)]
    calibration = [tuple(inputs) for inputs in sets]
    engine = bw.compile(
        old, fuse, calibration=calibration, recover=Recover(steps=3), backend="eager"
    )
    engine.save(tmp_path / "engine")
    again = bw.compile(
        old, fuse, calibration=calibration, recover=Recover(weights=tmp_path / "engine"),
        plans=tmp_path / "engine", backend="eager",
    )  # fmt: skip
    assert same(
        again.program, engine.program
    )  # though the second round removed what the first trained


def test_weights_that_a_file_lacks(
    old: Program, fused: Program, sets: Sets, tmp_path: Path
) -> None:
    some = {n: t.contiguous() for n, t in fused.tensors.items() if n != "blocks.0.up.weight"}
    save_file(some, tmp_path / "w.safetensors")
    with pytest.raises(OptionError, match=r"'blocks.0.up.weight'.*w.safetensors lacks it"):
        taken(old, sets, tmp_path / "w.safetensors")


def test_weights_of_another_shape(old: Program, fused: Program, sets: Sets, tmp_path: Path) -> None:
    some = {n: t.contiguous() for n, t in fused.tensors.items()}
    save_file({**some, "blocks.0.up.weight": torch.zeros(3, 8)}, tmp_path / "w.safetensors")
    with pytest.raises(OptionError, match=r"w.safetensors has \[3, 8\]"):
        taken(old, sets, tmp_path / "w.safetensors")
