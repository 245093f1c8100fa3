"""The report of a worker about a file that it wrote into a checkpoint."""

from pathlib import Path

from hybridrl.core.files import sha256, sync_to_disk
from hybridrl.types import SavedFile


def seal(path: Path) -> SavedFile:
    """Sync a file to disk, and return its size and digest as its writer sees them.

    The controller compares them with what it reads itself.

    Raises:
        OSError: the file cannot be synced or read.
    """
    sync_to_disk(path)
    return SavedFile(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))
