"""Files that are on the disk when we say so, known by their sha256."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from hybridrl.types import SavedFile


def seal(path: Path) -> SavedFile:
    """Sync a file to disk and say what is in it; its writer's own account, to be checked against what others read.

    Raises:
        OSError: it cannot be synced or read.
    """
    sync_to_disk(path)
    return SavedFile(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))


def replace_text(path: Path, text: str) -> None:
    """Write the whole file in one move: a reader, a kill or a loss of power leaves the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one stands.
    """
    aside = path.with_name(f".{path.name}")
    with named(path):
        aside.write_text(text, encoding="utf-8")
        sync_to_disk(aside)
        os.replace(aside, path)
        sync_to_disk(path.parent)


def append(file: FileIO, text: str) -> None:
    """Write to the end of a file and sync it; unbuffered, so that what could not be written is not tried again when it is closed.

    Raises:
        OSError: it cannot be written; part of the text may be there.
    """
    left = memoryview(text.encode())
    with named(Path(file.name)):
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError says which file it is about; those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """fsync a file, or a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
