"""A folder that is complete or absent: every file hashed, the manifest written last.

    manifest.json                               logical name -> file, SHA-256, size
    weights.0b1c2d3e4f5a6b7c.safetensors        the name holds the start of the hash

A new version of a file has a new name, so a save never touches what the old manifest refers to
until the new manifest has replaced it. Whatever interrupts a save, the folder is the old artefact
or the new one; leftovers are cleared by the next save.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..ir.errors import ArtefactError
from . import disk
from .plainjson import LARGEST, dumps, loads

MANIFEST = "manifest.json"
FORMAT, VERSION = "blockwright", 1
_OURS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.[0-9a-f]{16}(\.[A-Za-z0-9_]{1,20})?")
_AGAIN = "the artefact is damaged; save or download it again."


@dataclass(frozen=True)
class Entry:
    """A file of an artefact.

    Attributes:
        file: Its name in the folder.
        sha256: Hash of its bytes.
        size: Number of bytes.
        compiled: Whether it is code, loaded only from a trusted artefact.
    """

    file: str
    sha256: str
    size: int
    compiled: bool = False


class Writer:
    """Writes an artefact folder, as a context manager. Without `commit` nothing changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._stack = contextlib.ExitStack()
        self._before: set[str] = set()
        self._created = self._committed = False

    def __enter__(self) -> Self:
        try:
            _refuse_foreign(self.folder)
            self._created = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(disk.locked(self.folder))
            self._before = {path.name for path in self.folder.iterdir()}
            self._sweep(lambda name: name.startswith(disk.TEMPORARY))
        except OSError as error:
            raise disk.cannot_write(self.folder, error) from error
        return self

    def add(
        self, name: str, content: Iterable[bytes | memoryview], *, compiled: bool = False
    ) -> Entry:
        """Write a file and return where it is.

        Args:
            name: Logical name, as in `model.onnx`.
            content: Its bytes, in pieces.
            compiled: Whether it is code.
        """
        stem, dot, suffix = name.rpartition(".")
        path, digest, size = disk.store(self.folder, content)
        middle = f"{stem or suffix}.{digest[:16]}"
        entry = Entry(f"{middle}.{suffix}" if stem and dot else middle, digest, size, compiled)
        if name in self.entries or not _OURS.fullmatch(entry.file):
            raise ArtefactError(f"{name[:80]!r} cannot be the name of a file in an artefact.")
        self.entries[name] = entry
        disk.replace(path, self.folder / entry.file)
        return entry

    def commit(self, about: Mapping[str, Any]) -> None:
        """Put the manifest in place, then delete what only the old one referred to.

        Args:
            about: What the manifest says beside the list of files.
        """
        files = {name: asdict(entry) for name, entry in self.entries.items()}
        manifest = {**about, "format": FORMAT, "version": VERSION, "files": files}
        content = dumps({**manifest, "digest": _digest(manifest)})
        path, _, _ = disk.store(self.folder, [content])
        disk.sync_folder(self.folder)
        disk.replace(path, self.folder / MANIFEST)
        self._committed = True
        disk.sync_folder(self.folder)
        kept = {entry.file for entry in self.entries.values()}
        self._sweep(lambda name: bool(_OURS.fullmatch(name)) and name not in kept)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            if not self._committed:
                self._sweep(lambda name: _is_ours(name) and name not in self._before)
            if not self._committed and self._created:
                self.folder.rmdir()
        self._stack.close()
        if isinstance(error, OSError):
            raise disk.cannot_write(self.folder, error) from error

    def _sweep(self, doomed: Callable[[str], bool]) -> None:
        """Delete files; those that cannot be deleted stay, which is ugly and not wrong."""
        for path in list(self.folder.iterdir()):
            if doomed(path.name):
                with contextlib.suppress(OSError):
                    disk.remove(path)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return the manifest of an artefact and its files, every one checked.

    Raises:
        ArtefactError: The folder is no artefact, a newer one, or not what was saved.
    """
    manifest = _manifest(folder)
    try:
        entries = {name: Entry(**entry) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError("the list of files is malformed.", where=MANIFEST) from error
    for entry in entries.values():
        _verify(folder, entry)
    return manifest, entries


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir() or not path.exists():
        raise ArtefactError(
            f"{folder} is not a complete artefact: it has no {MANIFEST}.",
            where=str(folder),
            remedy="check the path; if a save was interrupted, save again.",
        )
    try:
        if path.stat().st_size > LARGEST:
            raise OSError(f"it is larger than {LARGEST} bytes")
        content = b"".join(disk.read_chunks(path))
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error}.", where=MANIFEST) from error
    manifest = loads(content, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtefactError(f"{folder} was not written by blockwright.", where=MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        raise ArtefactError(
            f"{folder} is an artefact of version {str(version)[:20]}; this blockwright reads"
            f" version {VERSION}.",
            where=MANIFEST,
            remedy="install a newer blockwright, or save the artefact with this one.",
        )
    if dumps(manifest) != content or manifest.pop("digest", None) != _digest(manifest):
        raise ArtefactError("the manifest is not as it was saved.", where=MANIFEST, remedy=_AGAIN)
    return manifest


def _verify(folder: Path, entry: Entry) -> None:
    """Check a file's name, kind, size and hash."""
    if not (isinstance(entry.file, str) and _OURS.fullmatch(entry.file)):
        raise ArtefactError(
            f"{str(entry.file)[:80]!r} is not a plain file name.", where=MANIFEST, remedy=_AGAIN
        )
    path, digest, size = folder / entry.file, hashlib.sha256(), 0
    try:
        if path.lstat().st_size == entry.size:
            for chunk in disk.read_chunks(path):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ArtefactError(
            f"cannot read {entry.file}: {error.strerror or error}.",
            where=str(path),
            remedy="an artefact is a folder of ordinary files, none of them a link.",
        ) from error
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise ArtefactError(
            f"{entry.file} is not as it was saved: its size or hash differs from the manifest.",
            where=str(path),
            remedy=_AGAIN,
        )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(dumps(manifest)).hexdigest()


def _refuse_foreign(folder: Path) -> None:
    """Refuse to save over something that is no artefact."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtefactError(
            f"{folder} is there and is not a folder.",
            where=str(folder),
            remedy="choose another path, or one that ends in .zip for a single file.",
        )
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strangers = {name for name in names if not _is_ours(name)}
    if strangers - {MANIFEST} and not (MANIFEST in names and _is_artefact(folder)):
        raise ArtefactError(
            f"{folder} holds other files, such as {min(strangers)!r}.",
            where=str(folder),
            remedy="save to a folder of its own.",
        )


def _is_ours(name: str) -> bool:
    return bool(_OURS.fullmatch(name)) or name.startswith(disk.TEMPORARY)


def _is_artefact(folder: Path) -> bool:
    try:
        manifest = loads((folder / MANIFEST).read_bytes(), MANIFEST)
    except (OSError, ArtefactError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT
