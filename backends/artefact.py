"""What is in an artefact, and how an engine goes in and comes out.

    weights.safetensors    tensors by name, mapped into memory on load
    graph.json             the program without its weights
    plan.json              what each pass decided
    certificate.json       what was measured
    report.html            both, for people
    model.onnx, ...        what the backend keeps, data
    package.so, ...        what the backend keeps, code: used only with `trust=True`

Loading interprets data and runs none of it.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import ArtefactError, BlockwrightError, LoweringError
from ..ir.program import Program
from ..ir.serialize import from_json, to_json
from . import container, disk, plainjson, weights
from .archive import packed, unpack
from .base import Lowered, WeightsFile
from .container import Entry, Writer
from .engine import Engine
from .plainjson import dumps
from .registry import get_backend

WEIGHTS, GRAPH = "weights.safetensors", "graph.json"
PLAN, CERTIFICATE, REPORT = "plan.json", "certificate.json", "report.html"
_OWN = {WEIGHTS, GRAPH, PLAN, CERTIFICATE, REPORT}
_PLANNED = ("pass", "options", "plan")
_FIELDS = {"format", "version", "files", "made_by", "backend", "recipe", "structure"}


def save(engine: Engine, path: str | Path) -> None:
    """Save an engine; afterwards `path` is the new artefact, or what it was before.

    Args:
        engine: What to save.
        path: A folder, new or an older artefact; or a file that ends in `.zip`.

    Raises:
        ArtefactError: The program has no form as data, or the disk refuses.
    """
    path = Path(path)
    if path.suffix == ".zip":
        with packed(path) as folder:
            _save(engine, folder)
    else:
        _save(engine, path)


def load(path: str | Path, *, backend: str | None = None, trust: bool = False) -> Engine:
    """Load an engine.

    Args:
        path: What `save` wrote.
        backend: Lower for another backend than the artefact was made for.
        trust: Use compiled code in the artefact. That runs code of whoever wrote it; without, the
            engine is compiled again from the data.

    Raises:
        ArtefactError: The artefact is damaged, unsafe or of a newer version.
        LoweringError: The backend is not installed here, or cannot run the program.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        return _load(path, backend, trust)
    try:
        unpacked = tempfile.TemporaryDirectory(prefix="blockwright-")
    except OSError as error:
        raise disk.cannot_write(Path(tempfile.gettempdir()), error) from error
    try:
        unpack(path, Path(unpacked.name))
        engine = _load(Path(unpacked.name), backend, trust)
    except BaseException:
        unpacked.cleanup()
        raise
    weakref.finalize(engine, unpacked.cleanup)
    return engine


def _save(engine: Engine, folder: Path) -> None:
    program, record = engine.program, engine.record
    plan, certificate = split_record(record)
    graph = dumps(to_json(program))
    _, spans = weights.layout(program.tensors)
    with Writer(folder) as writer:
        entry = writer.add(WEIGHTS, weights.chunks(program.tensors))
        writer.add(GRAPH, [graph])
        writer.add(PLAN, [dumps(plan)])
        writer.add(CERTIFICATE, [dumps(certificate)])
        writer.add(REPORT, [engine.report.html().encode()])
        files = engine.lowered.files(WeightsFile(entry.file, spans))
        for name, content in files.portable.items():
            writer.add(name, _chunks(content))
        for name, content in files.compiled.items():
            writer.add(name, _chunks(content), compiled=True)
        writer.commit(_about(engine))


def _about(engine: Engine) -> dict[str, Any]:
    options = {name: value for name, value in engine.options.items() if name != "threads"}
    return {
        "made_by": _made_by(),
        "backend": {"name": engine.backend, "options": options},
        "recipe": str(engine.record.get("recipe", "")),
        "structure": engine.program.structure_hash(),
    }


def _load(folder: Path, backend: str | None, trust: bool) -> Engine:
    manifest, entries = container.read(folder)
    for field in manifest.keys() ^ _FIELDS:
        raise ArtefactError(f"the manifest has one field too many or too few, {field[:80]!r}.")
    try:
        made_for, options = str(manifest["backend"]["name"]), dict(manifest["backend"]["options"])
        tensors = weights.read(folder / entries[WEIGHTS].file)
        program = from_json(plainjson.read(folder / entries[GRAPH].file), tensors)
        parts = (plainjson.read(folder / entries[name].file) for name in (PLAN, CERTIFICATE))
        record = join_record(*parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"{folder} lacks {error}, or holds it malformed.",
            where=container.MANIFEST,
            remedy="save or download the artefact again.",
        ) from error
    _require_graph_of(manifest, program)
    if backend is not None and backend != made_for:
        made_for, options, entries = backend, {}, {}
    usable = {name: entry for name, entry in entries.items() if trust or not entry.compiled}
    lowered = _lower(folder, program, made_for, options, usable)
    return Engine(program, lowered, made_for, record, options=options)


def _require_graph_of(manifest: Mapping[str, Any], program: Program) -> None:
    """Refuse a graph other than the manifest speaks of; other versions may spell it differently."""
    same = manifest["made_by"] == _made_by()
    if same and manifest["structure"] != program.structure_hash():
        raise ArtefactError(
            f"the graph is not the one this artefact was made with, {manifest['structure']!s:.16}.",
            where=GRAPH,
            remedy="files of two artefacts are mixed; save or download the artefact again.",
        )


def _lower(
    folder: Path,
    program: Program,
    name: str,
    options: Mapping[str, Any],
    entries: Mapping[str, Entry],
) -> Lowered:
    backend = get_backend(name)
    missing = backend.missing()
    if missing:
        raise LoweringError(
            f"the artefact is for {name}, which is not installed here.",
            where=str(folder),
            remedy=f'{missing}, or load it with backend="eager".',
        )
    files: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for logical, entry in entries.items():
        if logical not in _OWN:
            files[entry.compiled][logical] = folder / entry.file
    try:
        return backend.restore(program, *files, options)
    except BlockwrightError:
        raise
    except Exception as error:  # a library may fail in any way on files that are not ours
        reason = (str(error).splitlines() or [""])[0]
        raise ArtefactError(
            f"{name} cannot bring the program back: {type(error).__name__}: {reason[:200]}.",
            where=str(folder),
            remedy='load it with backend="eager", or save it again.',
        ) from error


def split_record(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a record into what was decided and what was measured."""
    if "steps" not in record:
        return {}, dict(record)
    steps = record["steps"]
    decided = [{key: step[key] for key in _PLANNED if key in step} for step in steps]
    measured = [{k: v for k, v in step.items() if k not in _PLANNED} for step in steps]
    return {"steps": decided}, {**record, "steps": measured}


def join_record(plan: Mapping[str, Any], certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `split_record`.

    Raises:
        ValueError: The two do not belong together.
    """
    if not isinstance(plan, dict) or not plan.keys() <= {"steps"}:
        raise ValueError("plan")
    if "steps" not in plan and "steps" not in certificate:
        return dict(certificate)
    pairs = zip(plan["steps"], certificate["steps"], strict=True)
    return {**certificate, "steps": [{**decided, **measured} for decided, measured in pairs]}


def _chunks(content: bytes | Path) -> Iterable[bytes]:
    return [content] if isinstance(content, bytes) else _read(content)


def _read(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


def _made_by() -> dict[str, str]:
    return {"blockwright": _version(), "torch": torch.__version__}


@cache
def _version() -> str:
    try:
        return importlib.metadata.version("blockwright")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
