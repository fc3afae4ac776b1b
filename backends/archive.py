"""One file instead of a folder: an uncompressed zip whose bytes depend on its content alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..ir.errors import ArtefactError
from . import disk

_MOST_FILES = 1000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def packed(path: Path) -> Iterator[Path]:
    """Give a folder to write into, and turn it into the zip at `path` when that went well.

    Raises:
        ArtefactError: The zip cannot be written; an older one is left as it was.
    """
    if path.is_symlink() or path.is_dir():
        raise ArtefactError(f"{path} is there and is not a file.", remedy="choose another path.")
    # Not the name itself, which may be as long as names can be.
    ours = f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}{disk.TEMPORARY}"
    work = path.with_name(ours + secrets.token_hex(8))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.locked(path.parent):
            for leftover in path.parent.glob(f"{ours}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            work.mkdir()
            yield work / "artefact"
            _pack(work / "artefact", work / "zip")
            disk.replace(work / "zip", path)
            disk.sync_folder(path.parent)
    except OSError as error:
        raise disk.cannot_write(path, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip that `packed` wrote.

    Raises:
        ArtefactError: It is damaged, or holds what no artefact holds: folders, compressed or
            encrypted entries, a name twice, more bytes than the file itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check(entries, path.stat().st_size)
            for entry in entries:
                with archive.open(entry) as source, (folder / entry.filename).open("xb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
    except ArtefactError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on a damaged file
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise disk.cannot_write(folder, error) from error
        raise _unsound(path, f"{type(error).__name__}: {error}") from error


def _check(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse entries before any of them is written."""
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names) or len(names) > _MOST_FILES:
        raise ValueError("a name is there twice, or there are too many files")
    for entry in entries:
        name = entry.filename
        if name.startswith(".") or not set(name).isdisjoint("/\\:\0") or not name.isprintable():
            raise ValueError(f"{name[:80]!r} is not a plain file name")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"{name[:80]!r} is compressed or encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("the entries are larger than the file")


def _pack(folder: Path, path: Path) -> None:
    with disk.create(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for source in sorted(folder.iterdir()):
                entry = zipfile.ZipInfo(source.name, date_time=_EPOCH)
                entry.external_attr = 0o644 << 16
                entry.file_size = source.stat().st_size
                with archive.open(entry, "w") as target, source.open("rb") as content:
                    shutil.copyfileobj(content, target, _CHUNK)
        disk.sync(file)


def _unsound(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path} is not a sound artefact: {reason[:200]}.",
        where=str(path),
        remedy="the file is damaged or not ours; save or download the artefact again.",
    )
