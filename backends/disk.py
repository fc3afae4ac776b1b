"""What a save does to a disk, one function each, so that tests can make each of them fail."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..ir.errors import ArtefactError

TEMPORARY = ".tmp-"
_CHUNK = 2**20


def create(path: Path) -> BinaryIO:
    """Open a file that must not exist yet."""
    return path.open("xb")


def write(file: BinaryIO, chunk: bytes | memoryview) -> None:
    """Append bytes."""
    file.write(chunk)


def sync(file: BinaryIO) -> None:
    """Return once the file's bytes would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def replace(old: Path, new: Path) -> None:
    """Rename in one step; a file of the new name is replaced."""
    os.replace(old, new)


def sync_folder(path: Path) -> None:
    """Return once the names in a folder would survive a power cut."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file."""
    path.unlink()


def temporary(folder: Path) -> Path:
    """Return a name that no other save uses."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


def store(folder: Path, content: Iterable[bytes | memoryview]) -> tuple[Path, str, int]:
    """Write a file under a temporary name and return its path, SHA-256 and size."""
    path, digest, size = temporary(folder), hashlib.sha256(), 0
    try:
        with create(path) as file:
            for chunk in content:
                write(file, chunk)
                digest.update(chunk)
                size += len(chunk)
            sync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise
    return path, digest.hexdigest(), size


def replace_file(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Write a whole file: afterwards the old one is there or the new one, never a part.

    Raises:
        ArtefactError: It cannot be written.
    """
    temporary_path: Path | None = None
    try:
        temporary_path, _, _ = store(path.parent, content)
        replace(temporary_path, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary_path is not None:
            with contextlib.suppress(OSError):
                remove(temporary_path)
        raise cannot_write(path, error) from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes.

    Raises:
        OSError: It is no ordinary file of its own: a link, a second name, a pipe.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise OSError("it is not an ordinary file with one name")
        while chunk := file.read(_CHUNK):
            yield chunk


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder; the lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows: two saves into one folder at once are the caller's business
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> ArtefactError:
    """Return the error for a failed save."""
    return ArtefactError(
        f"cannot write {path}: {error.strerror or error}.",
        where=str(path),
        remedy="free space on the disk or choose another place; what was there is unchanged.",
    )
