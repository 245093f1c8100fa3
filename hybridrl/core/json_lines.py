"""Files of one JSON object a line: on disk line by line, and read back whole or up to a step."""

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
    """The end of a file that exists; a line is on disk when `append` returns.

    It also notices that the file, or the directory around it, is no longer what its name leads to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._closed = False

    def append(self, line: str) -> None:
        """Unbuffered, so that what could not be written is not tried again later.

        Raises:
            OSError: it cannot be written; part of the line may be there.
        """
        remaining = memoryview(line.encode("utf-8", errors="backslashreplace"))
        with named(self.path):
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            os.fsync(self._file)

    def check_folder(self) -> None:
        """Raises:
        RunDirectoryTaken: the path of the directory leads to another directory.
        """
        if is_at(self._folder, self.path.parent) is False:
            raise RunDirectoryTaken(
                f"{self.path.parent}: another directory has taken the place of the run's own; "
                "nothing more is saved there, give the run that still goes on a run.dir of its own"
            )

    def check(self) -> None:
        """Raises:
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
    """Whether a path leads to what is open; None: it leads to nothing. True also where this cannot
    be known now.

    Some network file systems number files anew at every look, so equal size and time of change
    count as equal numbers.
    """
    try:
        there = os.stat(path)
    except ABSENT:
        return None
    except OSError:
        return (
            True  # a file server that fails for a moment; the next write shows whether it is gone
        )
    here = os.fstat(descriptor)
    same_change = (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)
    return os.path.samestat(here, there) or same_change


def read_lines(
    path: Path, parse: Callable[[Any], T], step: Callable[[T], int], through: int | None = None
) -> list[T]:
    """The objects of a file, oldest first; no file is no objects, and a last line without its end,
    which a kill leaves, is left out.

    Args:
        parse: from what JSON holds to an object; raises ValueError with the reason.
        step: the step that an object belongs to; steps never fall along the file.
        through: only objects up to this step; damage after them is of no account. None: all
            objects.

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
    # The last line that is needed is that of step `through`: without it, a damaged line may have
    # been it.
    if damage and (
        through is None or (through > 0 and (not objects or step(objects[-1]) < through))
    ):
        raise damage
    return objects


def whole_number(value: Any, what: str) -> int:
    """A count as JSON holds it, 3 or 3.0.

    Raises:
        ValueError: it is something else.
    """
    with suppress(OverflowError, ValueError):  # int() of an infinity or NaN
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 <= value < 2**53 and int(value) == value:
            return int(value)
    raise ValueError(f"{what} is {shortened(value)}, not a whole number from 0 on")


def shortened(value: Any) -> str:
    """A value in a message: printable, and no longer than a line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
