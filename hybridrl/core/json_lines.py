"""Files with one JSON object per line: durable appends, reads of all steps or the first ones."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hybridrl.core.errors import DataError, RunDirectoryError, RunDirectoryTaken
from hybridrl.core.files import ABSENT, named, read_text

T = TypeVar("T")


class Appender:
    """Appends lines to an existing file; a line is on disk when `append` returns.

    It also detects that the file or its directory was moved or replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._closed = False

    def append(self, line: str) -> None:
        """Write a line without buffering, so that a failed write is not repeated later.

        Raises:
            OSError: it cannot be written; part of the line may be in the file.
        """
        remaining = memoryview(line.encode("utf-8", errors="backslashreplace"))
        with named(self.path):
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            os.fsync(self._file)

    def check_folder(self) -> None:
        """Check that the path of the directory still leads to the directory that was opened.

        Raises:
            RunDirectoryTaken: it leads to another directory.
        """
        if is_at(self._folder, self.path.parent) is False:
            raise RunDirectoryTaken(
                f"{self.path.parent}: another directory has replaced the run's own, so nothing "
                "more is saved there; give each run a run.dir of its own"
            )

    def check(self) -> None:
        """Check that the path of the file still leads to the file that was opened.

        Raises:
            RunDirectoryTaken: as check_folder.
            RunDirectoryError: the file or its directory was removed, moved or replaced.
        """
        self.check_folder()
        if not is_at(self._file, self.path):
            raise RunDirectoryError(
                f"{self.path}: was removed, moved or replaced while the run wrote to it; "
                "the same command continues from the newest checkpoint"
            )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._file)
            os.close(self._folder)


def is_at(descriptor: int, path: Path) -> bool | None:
    """Whether a path leads to the file that is open; None where it leads to nothing.

    Also True where the file server fails for the moment; the next write shows whether the file is
    gone. Some network file systems report new inode numbers at every call, so equal size and
    modification time count as equal numbers.
    """
    try:
        at_path = os.stat(path)
    except ABSENT:
        return None
    except OSError:
        return True
    opened = os.fstat(descriptor)
    same_change = (opened.st_size, opened.st_mtime_ns) == (at_path.st_size, at_path.st_mtime_ns)
    return os.path.samestat(opened, at_path) or same_change


def read_lines(
    path: Path, parse: Callable[[Any], T], step: Callable[[T], int], through: int | None = None
) -> list[T]:
    """The objects of a file, oldest first; empty where there is no file.

    A last line without a line end, which a kill leaves behind, is ignored.

    Args:
        parse: converts a JSON value to an object; raises ValueError with the reason.
        step: the step that an object belongs to; steps never decrease along the file.
        through: the last step to read; damage after it is ignored. None: all objects.

    Raises:
        DataError: names the first damaged line.
        RunDirectoryError: the file is a link or a special file.
        OSError: it cannot be read.
    """
    objects: list[T] = []
    damage: DataError | None = None
    for number, line in enumerate((read_text(path) or "").split("\n")[:-1], start=1):
        try:
            parsed = parse(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
            damage = damage or DataError(
                f"{path}, line {number}: {reason}; repair or remove the line"
            )
            continue
        if through is not None and step(parsed) > through:
            continue
        if damage:
            raise damage
        objects.append(parsed)
    # Without a line of step `through`, a damaged line may be the missing one.
    if damage and (
        through is None or (through > 0 and (not objects or step(objects[-1]) < through))
    ):
        raise damage
    return objects


def whole_number(value: Any, what: str) -> int:
    """A count that JSON holds as 3 or 3.0.

    Raises:
        ValueError: the value is not a whole number from 0 on.
    """
    with suppress(OverflowError, ValueError):  # int() of an infinity or NaN
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 <= value < 2**53 and int(value) == value:
            return int(value)
    raise ValueError(f"{what} is {shortened(value)}, not a whole number from 0 on")


def shortened(value: Any) -> str:
    """A value for a message: printable, and at most 60 characters long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
