"""Digests of files, with a cache, so that a large file is read again only after a change."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xxhash

from hybridrl.core.errors import RunDirectoryError
from hybridrl.core.files import named, read_bytes, replace_text, retry
from hybridrl.models.loading import cache_dir

CACHED_FROM = 1 << 20
"""In bytes. Reading a smaller file is as fast as looking up its digest."""
SETTLED_S = 2.0
"""The age of a file in seconds after which a change certainly alters its times, on any file system.
"""
THREADS = 8  # xxhash releases the interpreter lock


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """One digest, in hexadecimal digits, of the names and the bytes of all (name, file) pairs.

    Raises:
        OSError: a file cannot be read.
    """
    pairs = sorted(files)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(digest, [path for _, path in pairs])
        lines = [f"{name!a} {value}\n" for (name, _), value in zip(pairs, digests, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal digits.

    For a large file it is looked up in the cache by path, size, inode, mtime and ctime.

    Raises:
        OSError: the file cannot be read, even after several attempts.
    """
    path = path.resolve()
    status = retry(path.stat)
    if status.st_size < CACHED_FROM:
        return read_digest(path)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    identity = [ascii(path), status.st_size, status.st_ino, *times]
    entry = cache_dir() / "digests" / f"{xxhash.xxh3_128_hexdigest(os.fsencode(path))}.json"
    with suppress(OSError, RunDirectoryError, ValueError, KeyError, TypeError):
        stored = json.loads(read_bytes(entry) or b"")
        if stored["identity"] == identity and isinstance(stored["digest"], str):
            return stored["digest"]
    value = read_digest(path)
    # The ctime matters too: a copy that keeps the mtime of its original gets a new ctime.
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S:
        with suppress(OSError):  # without a writable cache the file is read again the next time
            entry.parent.mkdir(parents=True, exist_ok=True)
            replace_text(entry, json.dumps({"identity": identity, "digest": value}))
    return value


def read_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal digits, without the cache.

    Raises:
        OSError: the file cannot be read, even after several attempts.
    """

    def read() -> str:
        with named(path), path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    return retry(read)
