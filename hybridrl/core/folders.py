"""Folders that appear with all their files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the block; an error removes it.

    An existing empty folder may be a volume, a link or the working directory of a shell, which
    cannot be replaced, so the files are moved into it one by one. The config files come last:
    without one, the folder does not count as a model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fills = is_empty_folder(folder)
    parent = folder if fills else folder.parent
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp makes folders that only their owner can open
        if fills:
            for file in sorted(unfinished.iterdir(), key=_is_config):
                os.rename(file, folder / file.name)
            unfinished.rmdir()
        else:
            swap(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def is_empty_folder(path: Path) -> bool:
    """Whether the path is a folder without any files."""
    return path.is_dir() and not any(path.iterdir())


def swap(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, and remove the folder that had this name."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old)
    else:
        os.rename(new, folder)


def _is_config(file: Path) -> bool:
    return file.name in ("config.json", "adapter_config.json")
