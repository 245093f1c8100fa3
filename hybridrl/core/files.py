"""Files that a run keeps: read through passing errors, replaced whole, on disk when a call returns,
never through a link.

A run directory may come from elsewhere, so a link or a device in the place of a file is refused;
and a file server may fail for a moment, so only a file that is certainly absent counts as absent.
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
"""Waits before another attempt at a read that failed; a file server that restarts is often back
within them.
"""

ABSENT = (FileNotFoundError, NotADirectoryError)
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Answers about the path itself: another attempt would give the same one."""


def retry(read: Callable[[], T]) -> T:
    """The result of `read`, attempted again after each OSError that may pass, such as ESTALE, EIO,
    EMFILE or EACCES.

    Raises:
        OSError: the last attempt's, or at once one that says what the path is.
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
    """Open a regular file for reading; a link is not followed, a pipe or device not waited for.

    Raises:
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunDirectoryError(f"{path}: a link; put the file itself in its place") from error
    file = os.fdopen(descriptor, "rb")
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise RunDirectoryError(f"{path}: not a file; remove it")
    return file


def read_bytes(path: Path) -> bytes | None:
    """The content of a plain file; None: there is certainly no such file.

    Raises:
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be read, also after some waiting.
    """

    def read() -> bytes:
        with named(path), open_plain(path) as file:
            return file.read()

    try:
        return retry(read)
    except ABSENT:
        return None


def read_text(path: Path) -> str | None:
    """As read_bytes, decoded; bytes that are no UTF-8 become replacement characters."""
    content = read_bytes(path)
    return None if content is None else content.decode("utf-8", errors="replace")


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name; empty where there is certainly no such folder.

    Raises:
        OSError: it cannot be listed, also after some waiting.
    """
    try:
        return sorted(folder / name for name in retry(lambda: os.listdir(folder)))
    except ABSENT:
        return []


def replace_text(path: Path, text: str) -> None:
    """As replace_bytes, of text; lone surrogates, which UTF-8 lacks, are written as escapes."""
    replace_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write the whole file in one move: a reader, a kill or a loss of power leaves the old one or
    the new one. A link in its place is replaced, not followed.

    Raises:
        OSError: it cannot be written; the old one stands.
    """
    aside = path.with_name(f".{path.name}")
    with named(path):
        aside.unlink(missing_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        sync_to_disk(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError says which file it is about; those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sha256(path: Path) -> str:
    """The digest of a file's content, in hexadecimal digits.

    Raises:
        OSError: it cannot be read, also after some waiting.
    """

    def read() -> str:
        with named(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry(read)


def sync_to_disk(path: Path) -> None:
    """fsync a file, or a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
