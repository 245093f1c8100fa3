"""Files of a run: reads that survive transient errors, and atomic, durable writes.

A run directory may come from elsewhere, so a link or a device in the place of a file is refused.
A file server may fail for a moment, so a file counts as absent only if the error certainly says so.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from hybridrl.core.errors import RunDirectoryError

T = TypeVar("T")

RETRY_AFTER_S = (0.1, 0.5, 2.0, 5.0)
"""Seconds to wait between attempts at a failed read; a restarting file server often needs less."""

ABSENT = (FileNotFoundError, NotADirectoryError)
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors about the path itself, which another attempt would raise again."""


def retry(read: Callable[[], T]) -> T:
    """The result of `read`, repeated after an OSError that may pass, such as ESTALE, EIO or EMFILE.

    Raises:
        OSError: the last attempt's error, or at once one of PERMANENT.
    """
    for wait_s in RETRY_AFTER_S:
        try:
            return read()
        except OSError as error:
            if error.errno in PERMANENT:
                raise
            time.sleep(wait_s)
    return read()


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading, without following a link or blocking on a pipe or device.

    Raises:
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunDirectoryError(f"{path}: is a link; replace it with the file itself") from error
    file = os.fdopen(descriptor, "rb")
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise RunDirectoryError(f"{path}: is not a file; remove it")
    return file


def read_bytes(path: Path) -> bytes | None:
    """The content of a plain file; None where there is certainly no such file.

    Raises:
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be read, even after the retries.
    """

    def read() -> bytes:
        with named(path), open_plain(path) as file:
            return file.read()

    try:
        return retry(read)
    except ABSENT:
        return None


def read_text(path: Path) -> str | None:
    """The decoded content of a plain file, as read_bytes.

    Bytes that are not UTF-8 become replacement characters.
    """
    content = read_bytes(path)
    return None if content is None else content.decode("utf-8", errors="replace")


def entries(folder: Path) -> list[Path]:
    """The paths in a folder, sorted by name; empty where there is certainly no such folder.

    Raises:
        OSError: it cannot be listed, even after the retries.
    """
    try:
        return sorted(folder / name for name in retry(lambda: os.listdir(folder)))
    except ABSENT:
        return []


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as replace_bytes does.

    Lone surrogates, which UTF-8 cannot encode, are written as escapes.
    """
    replace_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically and durably.

    A reader, a kill or a power failure sees the old content or the new content, never a mixture. A
    link at `path` is replaced, not followed.

    Raises:
        OSError: it cannot be written; the old file remains.
    """
    temporary = path.with_name(f".{path.name}")
    with named(path):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_to_disk(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the path to an OSError that lacks one, as those of write and fsync do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal digits.

    Raises:
        OSError: it cannot be read, even after the retries.
    """

    def read() -> str:
        with named(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry(read)


def sync_to_disk(path: Path) -> None:
    """Call fsync on a file, or on a folder to make the names in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
