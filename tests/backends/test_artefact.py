"""An artefact is what was saved or an error; a save is done or has not happened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from blockwright.backends import container, disk, registry, weights
from blockwright.backends.artefact import load, save
from blockwright.backends.base import Backend, Files, Lowered, WeightsFile
from blockwright.backends.container import MANIFEST, Writer
from blockwright.backends.eager import EagerBackend
from blockwright.backends.engine import Engine
from blockwright.backends.plainjson import dumps
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, LoweringError
from blockwright.ir.program import Program

X = torch.linspace(-1, 1, 16).reshape(2, 8)
RECORD = {
    "recipe": "fold-constants, quantize-weights{bits=8}",
    "model": "tiny",
    "notes": ["a note"],
    "steps": [
        {
            "pass": "fold-constants", "options": {}, "promise": "exact", "seconds": 0.1,
            "plan": {"decisions": {}, "skips": {"a": "is small"}},
            "receipt": {"changed": [], "skipped": {"a": "is small"}}, "certificate": None,
        },
        {"pass": "quantize-weights", "plan": {"decisions": {"b": {"bits": 8}}, "skips": {}}},
    ],
    "cost": {"before": {"parameters": 72}, "after": {"parameters": 72}},
}  # fmt: skip


class Tiny(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.second(torch.relu(self.first(x)))}


def engine_of(seed: int) -> Engine:
    rows = {"x": {0: torch.export.Dim("rows", min=1, max=64)}}
    program = capture(Tiny(seed), (X,), dynamic_shapes=rows)
    return Engine(program, EagerBackend().lower(program, {}), "eager", RECORD)


@pytest.fixture(scope="module")
def old() -> Engine:
    return engine_of(0)


@pytest.fixture(scope="module")
def new() -> Engine:
    return engine_of(1)


@pytest.fixture
def saved(old: Engine, tmp_path: Path) -> Path:
    old.save(tmp_path / "model.bw")
    return tmp_path / "model.bw"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def file_of(folder: Path, name: str) -> Path:
    _, entries = container.read(folder)
    return folder / entries[name].file


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as somebody would who knows how it is signed."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["digest"]
    edit(manifest)
    digest = hashlib.sha256(dumps(manifest)).hexdigest()
    (folder / MANIFEST).write_bytes(dumps({**manifest, "digest": digest}))


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest agree."""
    path, digest = file_of(folder, name), hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    edit_manifest(folder, lambda m: m["files"][name].update(sha256=digest, size=len(data)))


@pytest.mark.parametrize("name", ["model.bw", "model.zip", "sub folder/modèle.bw", "n" * 200])
def test_round_trip(old: Engine, tmp_path: Path, name: str) -> None:
    old.save(tmp_path / name)
    loaded = load(tmp_path / name)
    assert torch.equal(loaded(X)["y"], old(X)["y"])
    assert loaded(torch.ones(5, 8))["y"].shape == (5, 8)
    assert loaded.record == old.record
    assert loaded.backend == "eager"
    assert loaded.program.signature == old.program.signature
    assert loaded.program.text() == old.program.text()
    assert loaded.state_dict().keys() == old.state_dict().keys()
    for tensor, other in zip(loaded.state_dict().values(), old.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path, old: Engine) -> None:
    first = content(saved)
    again = load(saved)
    again.save(tmp_path / "again.bw")
    load(tmp_path / "again.bw").save(saved)
    assert content(tmp_path / "again.bw") == content(saved) == first
    old.save(tmp_path / "one.zip")
    load(tmp_path / "one.zip").save(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_it_holds_no_pickle_no_path_and_no_name_of_the_machine(saved: Path, tmp_path: Path) -> None:
    everything = b"".join(content(saved).values())
    assert not pickles(everything)
    for secret in (str(tmp_path), str(Path.home()), os.uname().nodename, __file__):
        assert secret.encode() not in everything
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ".html"}


def pickles(data: bytes) -> list[int]:
    """Return where a pickle may begin: the opcode PROTO, a version, FRAME or a short opcode."""
    return [match.start() for match in re.finditer(rb"\x80[\x02-\x05][\x95}\](K]", data)]


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"".join(weights.chunks({"big": torch.zeros(8 * 2**20)})))
    before = _resident()
    tensors = weights.read(path)
    assert _resident() - before < 8 * 2**20
    assert tensors["big"].shape == (8 * 2**20,)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", weights.DTYPES.values(), ids=str)
def test_every_type_and_odd_shapes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = (torch.arange(6).reshape(2, 3).to(torch.float32)).to(dtype)
    tensors = {"t": wide.t(), "empty": wide[:0], "scalar": wide[0, 0], "rows": wide[::2]}
    path = tmp_path / "t"
    path.write_bytes(b"".join(weights.chunks({**tensors, "odd": torch.ones(3).bool()})))
    found = weights.read(path)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape)
        assert found[name].tolist() == tensor.tolist()


def test_tensors_without_data_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        program = capture(nn.Linear(8, 8), (torch.ones(2, 8),))
    engine = Engine(program, Idle(), "eager", {})
    with pytest.raises(ArtefactError, match=r"tensor 'bias' .*on meta.* cannot be saved"):
        engine.save(tmp_path / "model.bw")
    assert not (tmp_path / "model.bw").exists()


# Damage


def flip(path: Path, bit: int) -> None:
    """Change one bit in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_of_a_container_is_found(tmp_path: Path) -> None:
    with Writer(tmp_path / "c") as writer:
        writer.add("data.bin", [b"contents"])
        writer.commit({})
    for path in list((tmp_path / "c").iterdir()):
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            with pytest.raises(ArtefactError):
                container.read(tmp_path / "c")
            flip(path, bit)
    container.read(tmp_path / "c")


def test_flipped_bits_of_an_artefact_are_found(saved: Path) -> None:
    dice = random.Random(0)
    for path in list(saved.iterdir()):
        for _ in range(50):
            bit = dice.randrange(8 * path.stat().st_size)
            flip(path, bit)
            with pytest.raises(ArtefactError):
                load(saved)
            flip(path, bit)
    load(saved)


def test_truncation_and_trailing_bytes_are_found(saved: Path) -> None:
    for path in list(saved.iterdir()):
        sound = path.read_bytes()
        for part in range(16):
            path.write_bytes(sound[: len(sound) * part // 16])
            with pytest.raises(ArtefactError):
                load(saved)
        path.write_bytes(sound + b" ")
        with pytest.raises(ArtefactError):
            load(saved)
        path.write_bytes(sound)


def test_a_damaged_zip_loads_the_same_or_not_at_all(old: Engine, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    old.save(path)
    sound, dice, rejected = path.read_bytes(), random.Random(0), 0
    for part in range(16):
        path.write_bytes(sound[: len(sound) * part // 16])
        with pytest.raises(ArtefactError):
            load(path)
    path.write_bytes(sound)
    for _ in range(60):
        bit = dice.randrange(8 * len(sound))
        flip(path, bit)
        try:
            assert torch.equal(load(path)(X)["y"], old(X)["y"])
        except ArtefactError:
            rejected += 1
        flip(path, bit)
    assert rejected > 50


# Attacks


def test_a_newer_version_is_refused_by_name(saved: Path) -> None:
    edit_manifest(saved, lambda m: m.update(version=2))
    with pytest.raises(ArtefactError, match=r"artefact of version 2; .*\n.*\n.*newer blockwright"):
        load(saved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(version="1"),
        lambda m: m.update(files=[]),
        lambda m: m["files"].pop("graph.json"),
        lambda m: m["files"]["graph.json"].update(unknown=1),
        lambda m: m["files"]["graph.json"].update(file=3),
        lambda m: m["files"]["graph.json"].update(size="9"),
        lambda m: m["files"]["graph.json"].update(file="../graph.0123456789abcdef.json"),
        lambda m: m["files"]["graph.json"].update(file="/etc/passwd"),
        lambda m: m["files"]["graph.json"].update(file="a/graph.0123456789abcdef.json"),
        lambda m: m["files"]["graph.json"].update(file="graph.0123456789abcdef.json"),
        lambda m: m.pop("backend"),
        lambda m: m.update(backend={"name": 3, "options": 3}),
        lambda m: m.update(surprise=True),
    ],
)
def test_a_forged_manifest_is_refused(saved: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_manifest(saved, edit)
    with pytest.raises(ArtefactError):
        load(saved)


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"format":"blockwright","format":"blockwright"}',
        b'{"format":"blockwright","version":NaN}', b'{"format":"blockwright","version":1e400}',
        b"[" * 100_000, b'{"version":' + b"9" * 5000 + b"}", b"\x80\x04K\x01.",
    ],
    ids=range(11),
)  # fmt: skip
def test_a_manifest_that_is_no_json_is_refused(saved: Path, manifest: bytes) -> None:
    (saved / MANIFEST).write_bytes(manifest)
    with pytest.raises(ArtefactError):
        load(saved)


def test_a_file_may_not_be_a_link_or_a_pipe(saved: Path, tmp_path: Path) -> None:
    for name in ("weights.safetensors", "graph.json"):
        path = file_of(saved, name)
        shutil.move(path, tmp_path / "outside")
        for make in (path.symlink_to, path.hardlink_to):
            make(tmp_path / "outside")
            with pytest.raises(ArtefactError, match=r"cannot read|link"):
                load(saved)
            path.unlink()
        os.mkfifo(path)
        with pytest.raises(ArtefactError):
            load(saved)
        path.unlink()
        shutil.move(tmp_path / "outside", path)
    shutil.move(saved / MANIFEST, tmp_path / "outside")
    (saved / MANIFEST).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtefactError, match="cannot read"):
        load(saved)


def header(entries: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries + data


ONE = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "one byte": b"\x00",
        "header beyond the file": struct.pack("<Q", 2**62) + b"{}",
        "no JSON": header(b"\xff\xfe"),
        "a name twice": header(b'{"a":{%b},"a":{%b}}' % (ONE, ONE), bytes(4)),
        "an overlap": header(b'{"a":{%b},"b":{%b}}' % (ONE, ONE), bytes(4)),
        "a hole": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        "trailing bytes": header(b'{"a":{%b}}' % ONE, bytes(5)),
        "a negative size": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
        "a huge size": header(
            b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
        ),
        "an unknown type": header(
            b'{"a":{"dtype":"PY","shape":[1],"data_offsets":[0,4]}}', b"0000"
        ),
        "a list": header(b"[]"),
        "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
        "another model": b"".join(weights.chunks({"a": torch.ones(1)})),
    }.items(),
    ids=lambda item: item[0],
)
def test_weights_that_are_not_sound_are_refused(saved: Path, data: tuple[str, bytes]) -> None:
    forge(saved, "weights.safetensors", data[1])
    with pytest.raises(ArtefactError):
        load(saved)


@pytest.mark.parametrize("name", ["graph.json", "plan.json", "certificate.json"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"3", b'{"steps":3}', b'{"a":1,"a":2}'])
def test_files_that_are_not_ours_are_refused(saved: Path, name: str, data: bytes) -> None:
    forge(saved, name, data)
    with pytest.raises(ArtefactError):
        load(saved)


def test_loading_opens_nothing_else_and_imports_nothing(saved: Path) -> None:
    load(saved)
    events: list[tuple[str, Any]] = []
    listening = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event in (
            "import",
            "open",
            "os.system",
            "subprocess.Popen",
            "pickle.find_class",
        ):
            events.append((event, arguments[0]))

    sys.addaudithook(hook)  # there is no way to remove one
    load(saved)
    listening = False
    opened = {
        str(name) for event, name in events if event == "open" and isinstance(name, str | Path)
    }
    assert {name for name in opened if not name.startswith(str(saved))} == set()
    assert {
        name for event, name in events if event == "import" and name not in sys.modules
    } == set()
    assert {event for event, _ in events} <= {"open", "import"}


def write_zip(path: Path, names: list[str], **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, bytes(100_000))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["../evil"], {}), (["/evil"], {}), (["a/b"], {}), ([".hidden"], {}), (["c:evil"], {}),
        (["back\\slash"], {}), (["bomb"], {"compression": zipfile.ZIP_DEFLATED}),
    ],
)  # fmt: skip
def test_a_zip_with_strange_entries_is_refused_unread(
    tmp_path: Path, names: list[str], options: dict[str, Any]
) -> None:
    write_zip(tmp_path / "model.zip", names, **options)
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ArtefactError, match="not a sound artefact"):
        load(tmp_path / "model.zip")
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "model.zip", ["manifest.json", "manifest.json"])
    with pytest.raises(ArtefactError, match="there twice"):
        load(tmp_path / "model.zip")


def test_a_missing_artefact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(ArtefactError, match="is not a complete artefact"):
            load(tmp_path / name)


# Saving


def test_a_save_clears_what_the_old_version_left(saved: Path, new: Engine) -> None:
    before = set(content(saved))
    (saved / f"{disk.TEMPORARY}0123").write_bytes(b"left by a save that was killed")
    (saved / "notes.txt").write_text("by the user")
    new.save(saved)
    _, entries = container.read(saved)
    expected = {entry.file for entry in entries.values()} | {MANIFEST, "notes.txt"}
    assert set(content(saved)) == expected
    assert torch.equal(load(saved)(X)["y"], new(X)["y"])
    assert before - expected


def test_a_folder_of_other_things_is_not_touched(old: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "link.zip").symlink_to(tmp_path / "file")
    for name in ("mine", "file", "link", "link.zip"):
        with pytest.raises(ArtefactError):
            old.save(tmp_path / name)
    assert content(tmp_path / "mine") == {"thesis.tex": b"..."}
    assert (tmp_path / "file").read_text() == "..."


STEPS = ("create", "write", "sync", "replace", "sync_folder", "remove")


def interrupt(
    monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], None]
) -> Callable[[], bool]:
    """Let the `at`-th step that a save takes on the disk do `action` instead."""
    taken = 0

    def instead(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == at:
                action()
            return step(*args)

        return run

    for name in STEPS:
        monkeypatch.setattr(disk, name, instead(getattr(disk, name)))
    return lambda: taken >= at


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def control_c() -> None:
    raise KeyboardInterrupt


def interrupted_saves(
    folder: Path, engine: Engine, action: Callable[[], None]
) -> Iterator[tuple[int, BaseException | None]]:
    """Save once per step of a save, that step failing; stop when there are no more steps."""
    for at in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            happened = interrupt(patch, at, action)
            try:
                engine.save(folder)
                error: BaseException | None = None
            except (ArtefactError, KeyboardInterrupt) as caught:
                error = caught
            if not happened():
                return
        yield at, error


def version_of(folder: Path, old: Engine, new: Engine) -> str:
    """Say which engine a folder holds, from checked files alone."""
    tensors = weights.read(file_of(folder, "weights.safetensors"))
    for name, engine in (("old", old), ("new", new)):
        if all(torch.equal(tensors[key], t) for key, t in engine.program.tensors.items()):
            return name
    raise AssertionError("neither")


@pytest.mark.parametrize("action", [full_disk, control_c])
def test_a_failed_save_leaves_the_old_artefact_or_the_new_one(
    old: Engine, new: Engine, tmp_path: Path, action: Callable[[], None]
) -> None:
    old.save(tmp_path / "old")
    folder, seen = tmp_path / "model.bw", []
    shutil.copytree(tmp_path / "old", folder)
    for _, error in interrupted_saves(folder, new, action):
        version = version_of(folder, old, new)
        seen.append((version, type(error)))
        if version == "old":
            assert error is not None
            assert content(folder) == content(tmp_path / "old")
        if isinstance(error, ArtefactError):
            assert "No space left" in str(error)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
    assert len(seen) > 20
    assert {version for version, _ in seen} == {"old", "new"}


def test_a_failed_first_save_leaves_nothing(old: Engine, tmp_path: Path) -> None:
    for name in ("model.bw", "model.zip"):
        for at, error in interrupted_saves(tmp_path / name, old, full_disk):
            if error is not None and not (tmp_path / name).exists():
                assert list(tmp_path.iterdir()) == [], at
                continue
            assert torch.equal(load(tmp_path / name)(X)["y"], old(X)["y"])
            shutil.rmtree(tmp_path / name) if name == "model.bw" else (tmp_path / name).unlink()
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).unlink(missing_ok=True)


def test_a_killed_save_leaves_the_old_artefact_or_the_new_one(
    old: Engine, new: Engine, tmp_path: Path
) -> None:
    folder, versions = tmp_path / "model.bw", set()
    for at in range(1, 60):
        old.save(folder)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, at, lambda: os._exit(9))
                save(new, folder)
                os._exit(0)
        _, status = os.waitpid(child, 0)
        versions.add(version_of(folder, old, new))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert at > 20
    assert versions == {"old", "new"}
    old.save(folder)
    assert not [name for name in content(folder) if name.startswith(disk.TEMPORARY)]
    assert len(content(folder)) == 6


def test_two_saves_into_one_folder_wait_for_each_other(
    old: Engine, new: Engine, tmp_path: Path
) -> None:
    children = []
    for engine in (old, new, old):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for _ in range(5):
                    engine.save(tmp_path / "model.bw")
                    engine.save(tmp_path / "model.zip")
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    version_of(tmp_path / "model.bw", old, new)
    assert len(content(tmp_path / "model.bw")) == 6
    load(tmp_path / "model.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"model.bw", "model.zip"}


def test_files_are_on_the_disk_before_the_manifest_names_them(
    old: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def traced(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            order.append("publish" if Path(str(args[-1])).name == MANIFEST else name)
            return step(*args)

        return run

    for name in ("sync", "replace", "sync_folder"):
        monkeypatch.setattr(disk, name, traced(name, getattr(disk, name)))
    old.save(tmp_path / "model.bw")
    assert order == ["sync", "replace"] * 5 + ["sync", "sync_folder", "publish", "sync_folder"]


# Backends


class Idle(Lowered):
    def run(self, inputs: Any) -> list[Tensor]:
        return list(inputs)


class Keeper(Lowered):
    """Keeps a model that names the weights, and code."""

    def run(self, inputs: Any) -> list[Tensor]:
        return [torch.zeros(inputs[0].shape)]

    def files(self, weights: WeightsFile) -> Files:
        begin, length = weights.spans["first.bias"]
        model = f"{weights.name} {begin} {length}".encode()
        return Files({"model.onnx": model}, {"package.so": b"\x7fELF"})


class Recording(Backend):
    name: ClassVar[str] = "recording"
    calls: ClassVar[list[Any]] = []
    absent: ClassVar[str | None] = None

    def missing(self) -> str | None:
        return self.absent

    def lower(self, program: Program, options: Mapping[str, Any]) -> Lowered:
        self.calls.append(("lower", dict(options)))
        return Keeper()

    def restore(
        self,
        program: Program,
        portable: Mapping[str, Path],
        compiled: Mapping[str, Path],
        options: Mapping[str, Any],
    ) -> Lowered:
        found = {name: path.read_bytes() for name, path in (portable | compiled).items()}
        self.calls.append(("restore", found, dict(options)))
        return Keeper()


@pytest.fixture
def recording(old: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    point = type("Point", (), {"name": "recording", "load": lambda self: Recording})()
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(Recording, "calls", [])
    options = {"level": 3, "threads": 2}
    save(Engine(old.program, Keeper(), "recording", {}, options=options), tmp_path / "model.bw")
    return tmp_path / "model.bw"


def test_a_backend_gets_its_files_back_and_refers_to_the_weights(recording: Path) -> None:
    load(recording)
    ((_, files, options),) = Recording.calls
    assert options == {"level": 3}
    name, begin, length = files["model.onnx"].decode().split()
    data = (recording / name).read_bytes()[int(begin) : int(begin) + int(length)]
    tensors = weights.read(recording / name)
    assert data == tensors["first.bias"].numpy().tobytes()


def test_code_is_handed_over_only_when_trusted(recording: Path) -> None:
    load(recording)
    load(recording, trust=True)
    plain, trusted = (files for _, files, _ in Recording.calls)
    assert set(plain) == {"model.onnx"}
    assert trusted["package.so"] == b"\x7fELF"


def test_another_backend_lowers_anew(recording: Path, old: Engine) -> None:
    engine = load(recording, backend="eager")
    assert (engine.backend, Recording.calls) == ("eager", [])
    assert torch.equal(engine(X)["y"], old(X)["y"])


def test_a_missing_backend_says_what_to_do(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "absent", "pip install recording")
    with pytest.raises(
        LoweringError, match='pip install recording, or load it with backend="eager"'
    ):
        load(recording)


def test_a_backend_that_fails_on_foreign_files_is_an_error_of_the_artefact(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Lowered:
        raise ValueError("bad protobuf")

    monkeypatch.setattr(Recording, "restore", fail)
    with pytest.raises(
        ArtefactError, match=r"recording cannot bring the program back.*bad protobuf"
    ):
        load(recording)


def test_a_backend_may_not_overwrite_our_files(old: Engine, tmp_path: Path) -> None:
    for name in ("graph.json", "../evil.json", "a b", ""):
        lowered = Idle()
        lowered.files = lambda weights, name=name: Files({name: b""})  # type: ignore[method-assign]
        with pytest.raises(ArtefactError, match="cannot be the name of a file"):
            Engine(old.program, lowered, "eager", {}).save(tmp_path / "model.bw")
        assert not (tmp_path / "model.bw").exists()
