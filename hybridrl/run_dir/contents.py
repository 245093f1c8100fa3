"""Digests of what files hold. A large file is read once: until it changes, its digest is looked
up.
"""

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
"""Bytes; smaller files are read again as fast as their digest is looked up."""
SETTLED_S = 2.0
"""Age of a file from which another change would show in its times, however coarse those of its file
system are.
"""
THREADS = 8  # xxhash lets go of the interpreter lock


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """One digest of (name, file) pairs, in hexadecimal digits: it changes with a name, with a byte,
    or with what is there.

    Raises:
        OSError: a file cannot be read.
    """
    pairs = sorted(files)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(digest, [path for _, path in pairs])
        lines = [f"{name!a} {found}\n" for (name, _), found in zip(pairs, digests, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal digits, found again by path, size, inode and times
    of change.

    Raises:
        OSError: it cannot be read, also after some waiting.
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
    found = read_digest(path)
    if time.time() - status.st_mtime > SETTLED_S:
        with suppress(OSError):  # a home that cannot be written: read again the next time
            entry.parent.mkdir(parents=True, exist_ok=True)
            replace_text(entry, json.dumps({"identity": identity, "digest": found}))
    return found


def read_digest(path: Path) -> str:
    def read() -> str:
        with named(path), path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    return retry(read)
