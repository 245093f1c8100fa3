"""What a worker reports of each file that it wrote into a checkpoint."""

from pathlib import Path

from hybridrl.core.files import sha256, sync_to_disk
from hybridrl.types import SavedFile


def seal(path: Path) -> SavedFile:
    """Sync a file to disk and say what is in it; its writer's own account, to be checked against
    what others read.

    Raises:
        OSError: it cannot be synced or read.
    """
    sync_to_disk(path)
    return SavedFile(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))
