"""Folders that appear with all their files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder for the files of `folder`. At the end of the block it gets that name, in
    the place of what had it; after an error it is removed.

    An empty folder that exists may be a volume, a link or the working directory of a shell, and
    cannot be replaced. It gets the files one by one, those without which it counts as no model at
    the end.
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
