"""Artefacts and checkpoints of strangers: entries 1 to 30 of docs/bad-inputs.md."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from blockwright.backends import container, weights
from blockwright.backends.artefact import load
from blockwright.backends.container import MANIFEST, Writer
from blockwright.backends.eager import EagerBackend
from blockwright.backends.engine import Engine
from blockwright.backends.plainjson import dumps
from blockwright.driver.cli import app
from blockwright.ir.capture import capture
from blockwright.ir.errors import ArtefactError, BlockwrightError
from blockwright.ir.serialize import check_name


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(folder: Path, content: bytes) -> dict[str, Tensor]:
    (folder / "w.safetensors").write_bytes(content)
    return weights.read(folder / "w.safetensors")


@pytest.mark.parametrize(
    "content",
    {
        "header one byte too long": header(b"{}", length=3),
        "depth 10 000": header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        "a number beyond doubles": header(b'{"a":{"dtype":"F32","shape":[1e400]}}'),
        "NaN": header(b'{"a":{"dtype":"F32","shape":[NaN]}}'),
        "four bits": header({"a": entry("F4", [3], 0, 2)}, bytes(2)),
        "six bits": header({"a": entry("F6_E2M3", [3], 0, 3)}, bytes(3)),
        "an empty one in the middle": header(
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [0], 2, 2)}, bytes(4)
        ),
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_headers_that_are_not_sound_are_refused(tmp_path: Path, content: tuple[str, bytes]) -> None:
    with pytest.raises(ArtefactError, match=r"w\.safetensors"):
        read(tmp_path, content[1])


def test_empty_tensors_take_no_room_and_may_share_a_place(tmp_path: Path) -> None:
    table = {
        "a": entry("F32", [0], 0, 0),
        "b": entry("F32", [3, 0], 0, 0),
        "c": entry("F32", [1], 0, 4),
        "d": entry("F32", [0, 2**40], 4, 4),
    }
    found = read(tmp_path, header(table, bytes(4)))
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    assert shapes == {"a": [0], "b": [3, 0], "c": [1], "d": [0, 2**40]}


@pytest.mark.parametrize(
    "name", ["..", "../x", "a..b", "a\0b", "a\u202eb", "x" * 10_000_000], ids=lambda n: n[:5]
)
def test_names_that_could_harm_are_refused(name: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        check_name(name)
    assert len(str(caught.value)) < 400


def test_names_are_never_paths(tmp_path: Path) -> None:
    """A slash is harmless: files are named by hashes, and names are compared bit by bit."""
    model = nn.Sequential()
    for name in ("a/b", "class", "class#", "\u00e9", "e\u0301"):  # the last two look alike
        model.add_module(name, nn.Linear(2, 2))
    x = torch.ones(1, 2)
    program = capture(model, (x,))
    engine = Engine(program, EagerBackend().lower(program, {}), "eager", {})
    engine.save(tmp_path / "model.bw")
    assert torch.equal(load(tmp_path / "model.bw")(x), model(x))
    assert {path.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path / "model.bw"}


class Marker:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pt2", "w.zip", "w.bw", "w.onnx"])
def test_nothing_is_unpickled_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    torch.save({"weight": Marker(marker)}, path)
    for attempt in (load, capture, weights.read):
        with pytest.raises(BlockwrightError):
            attempt(path)
    for command in ("inspect", "run", "compile"):
        result = CliRunner().invoke(app, [command, str(path)])
        assert result.exit_code == 2, result.output
    assert not marker.exists()


def test_an_exported_program_on_the_disk_is_not_opened(tmp_path: Path) -> None:
    """Its loader evaluates the expressions of sizes; this one would leave a file."""
    marker, path = tmp_path / "marker", tmp_path / "m.pt2"
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(exported, path)
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/models/evil.json", json.dumps({"range_constraints": {code: 1}}))
    for attempt in (load, capture):
        with pytest.raises(BlockwrightError):
            attempt(path)
    assert not marker.exists()


def test_a_zip_in_a_zip_stays_shut(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(50_000_000))
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr(MANIFEST, inner.getvalue())
    with pytest.raises(ArtefactError, match="not valid JSON"):
        load(tmp_path / "outer.zip")


def test_a_zip_that_lies_about_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, b"{}")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, 2**62)  # zip64: the size is in the extra field
    data[at + 24 : at + 28] = b"\xff" * 4
    data[at + 30 : at + 32] = struct.pack("<H", len(extra))
    name = at + 46 + len(MANIFEST)
    data[name:name] = extra
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<L", end - at)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].file_size == 2**62
    with pytest.raises(ArtefactError, match="larger than the file"):
        load(path)


class Act(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


def test_the_graph_of_another_artefact_is_refused(tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    for name, act in (("one", nn.ReLU()), ("two", nn.GELU())):
        program = capture(Act(act), (x,))
        Engine(program, EagerBackend().lower(program, {}), "eager", {}).save(tmp_path / name)
    one, two = (container.read(tmp_path / name)[1]["graph.json"] for name in ("one", "two"))
    content = (tmp_path / "two" / two.file).read_bytes()
    (tmp_path / "one" / one.file).write_bytes(content)
    manifest = json.loads((tmp_path / "one" / MANIFEST).read_bytes())
    del manifest["digest"]
    manifest["files"]["graph.json"].update(sha256=two.sha256, size=two.size)
    digest = hashlib.sha256(dumps(manifest)).hexdigest()
    (tmp_path / "one" / MANIFEST).write_bytes(dumps({**manifest, "digest": digest}))
    with pytest.raises(ArtefactError, match="not the one this artefact was made with"):
        load(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_flipped_bit_of_four_kibibytes_is_found(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(600.0), "b": torch.ones(200)}
    with Writer(tmp_path / "c") as writer:
        writer.add("weights.safetensors", weights.chunks(tensors))
        writer.add("graph.json", [dumps({"nodes": list(range(50))})])
        writer.commit({"recipe": "none"})
    paths = sorted((tmp_path / "c").iterdir())
    assert sum(path.stat().st_size for path in paths) >= 4096
    flips = 0
    for path in paths:
        sound = path.read_bytes()
        for bit in range(8 * len(sound)):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ArtefactError):
                container.read(tmp_path / "c")
            flips += 1
        path.write_bytes(sound)
    assert flips >= 8 * 4096
    container.read(tmp_path / "c")
