"""Sealing a file of a checkpoint: its writer syncs it and reports its size and digest."""

from pathlib import Path

from hybridrl.core.files import sha256, sync_to_disk
from hybridrl.types import SavedFile


def seal(path: Path) -> SavedFile:
    """Sync a file to disk, and return the size and digest that its writer sees.

    The controller compares them with the file that it reads itself.

    Raises:
        OSError: the file cannot be synced or read.
    """
    sync_to_disk(path)
    return SavedFile(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))
