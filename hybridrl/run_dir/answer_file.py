"""A file of answers, one JSON object a line, which can be continued after an interruption.

    answers.jsonl                       the rows
    answers.jsonl.state/settings.json   what the rows depend on
    answers.jsonl.state/logs/           one file for each worker

A continued file must have the same rows as an uninterrupted one, so continuing is refused if
anything differs on which the rows depend.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.core.files import named, read_text, replace_text, sync_to_disk
from hybridrl.core.json_lines import Appender, shortened

UID = "uid"
SETTINGS = "settings.json"
NOT_SET = "(not set)"


def state_folder(path: Path) -> Path:
    """The folder for the state of a file of answers, next to it."""
    return path.with_name(f"{path.name}.state")


class AnswerFile:
    """A file of rows with unique values of `uid`. Use `opened` to make one.

    Example:
        with opened(Path("answers.jsonl"), {"run.seed": 0}) as file:
            file.append([{"uid": "prompt-000001", "responses": ["3*8"]}])
            file.put_in_order(["prompt-000001"])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans = row_spans(path)
        """(begin, end) in bytes of each row, by its uid, in the order of the file."""
        self._size = max((end for _, end in self.spans.values()), default=0)
        self._appender = Appender(path)

    @property
    def done(self) -> frozenset[str]:
        """The uids of the rows."""
        return frozenset(self.spans)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns.

        Raises:
            OSError: they cannot be written.
        """
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        self._appender.append("".join(lines))
        for row, line in zip(rows, lines, strict=True):
            end = self._size + len(line.encode("utf-8", errors="backslashreplace"))
            self.spans[row[UID]] = (self._size, end)
            self._size = end

    def put_in_order(self, uids: Sequence[str]) -> None:
        """Sort the rows by the order of the prompts. The file is replaced atomically, and nothing
        can be appended afterwards.

        Args:
            uids: the uids of all prompts, each of which has a row.
        """
        self._appender.close()
        if list(self.spans) == list(uids):
            return
        sorted_copy = self.path.with_name(f".{self.path.name}")
        with named(self.path), self.path.open("rb") as source, sorted_copy.open("wb") as target:
            for uid in uids:
                begin, end = self.spans[uid]
                source.seek(begin)
                target.write(source.read(end - begin))
            target.flush()
            os.fsync(target.fileno())
        os.replace(sorted_copy, self.path)
        sync_to_disk(self.path.parent)

    def close(self) -> None:
        self._appender.close()


@contextmanager
def opened(path: Path, conditions: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Begin or continue a file of answers, and lock it until the end of the block.

    Args:
        conditions: everything that the rows depend on, as values that JSON can hold, by the names
            that an error reports.

    Raises:
        ConfigError: the file was begun with other conditions or not by this command, or another
            command is writing it.
        DataError: a row is damaged.
        OSError: the file cannot be read or written.
    """
    state = state_folder(path)
    with named(path):
        state.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{path}: another command is writing it; wait for it, or name another file"
        ) from error
    try:
        check_conditions(path, conditions)
        path.touch()
        remove_torn_row(path)
        replace_text(state / SETTINGS, json.dumps(conditions, indent=1, default=str))
        with closing(AnswerFile(path)) as file:
            yield file
    finally:
        lock.release()


def check_conditions(path: Path, conditions: Mapping[str, Any]) -> None:
    """Check that a file, if it has rows, was begun with these conditions.

    Raises:
        ConfigError: they differ, and the message names each difference; or the earlier conditions
            are unknown.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    text = read_text(state_folder(path) / SETTINGS)
    if text is None:
        raise ConfigError(
            f"{path}: exists, but was not begun by an earlier run of this command; choose another "
            "--out"
        )
    try:
        earlier = json.loads(text)
        if not isinstance(earlier, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{state_folder(path) / SETTINGS}: is damaged, so the settings of {path} are unknown; "
            "choose another --out"
        ) from error
    now = json.loads(json.dumps(conditions, default=str))
    different = [
        f"{name}: {shown(earlier, name)} -> {shown(now, name)}"
        for name in dict.fromkeys([*earlier, *now])
        if earlier.get(name, NOT_SET) != now.get(name, NOT_SET)
    ]
    if different:
        raise ConfigError(
            f"{path}: was begun with other settings ({', '.join(different)}); give the earlier "
            "ones to continue it, or choose another --out"
        )


def shown(conditions: Mapping[str, Any], name: str) -> str:
    """The value of a condition for a message, shortened."""
    return shortened(conditions[name]) if name in conditions else NOT_SET


def remove_torn_row(path: Path) -> None:
    """Cut off a last row without a line end, which a killed command leaves behind."""
    with path.open("rb+") as file:
        end = 0
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        file.truncate(end)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file in order."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def row_spans(path: Path) -> dict[str, tuple[int, int]]:
    """(begin, end) in bytes of each row, by its uid.

    Raises:
        DataError: a line is not a row, or has the uid of an earlier one; the message names it.
    """
    spans: dict[str, tuple[int, int]] = {}
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            end = begin + len(line)
            try:
                uid = json.loads(line)[UID]
                repeated = uid in spans
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not a row with a {UID}; repair or remove the line"
                ) from error
            if repeated:
                raise DataError(
                    f"{path}, line {number}: another row with the {UID} {shortened(uid)}; remove "
                    "one of the two lines"
                )
            spans[uid] = (begin, end)
            begin = end
    return spans
