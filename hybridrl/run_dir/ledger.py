"""ledger.jsonl: which prompts each step trained on, and the proof that none was trained twice or
left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridrl.core.errors import DataError, LedgerError
from hybridrl.core.files import replace_text
from hybridrl.core.json_lines import Appender, read_lines, whole_number
from hybridrl.data.prompts import PromptSource
from hybridrl.types import Prompt

LEDGER = "ledger.jsonl"
FAR = 1_000_000
"""Prompts that a cursor may stand beyond twice the recorded ones and still be compared with them
one by one.
"""


class Ledger:
    """One line a step, on disk before the step's checkpoint is: {"step": 1, "trained": ["a@0"],
    "passed_over": ["b@0"]}.

    A resumed run first cuts the steps after its checkpoint, which it takes again.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Args: first_step: steps that are done, 0 or what the checkpoint says.

        Raises:
            LedgerError: the file is damaged before the end of that step.
            OSError: it cannot be read, and is left as it is, or cannot be written.
        """
        path = run_dir / LEDGER
        kept = read_ledger(run_dir, first_step) if first_step else []
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = Appender(path)

    def record(self, step: int, trained: Sequence[str], passed_over: Sequence[str] = ()) -> None:
        """Args: passed_over: prompts that were drawn and not trained on, as aborted, failed or with
        equal rewards.
        """
        line = {"step": step, "trained": list(trained), "passed_over": list(passed_over)}
        self._file.append(json.dumps(line) + "\n")

    def check_in_place(self) -> None:
        """Raises:
        RunDirectoryTaken: another directory stands in the place of the run's.
        RunDirectoryError: the ledger or the whole directory was removed, moved or replaced.
        """
        self._file.check()

    def check_folder(self) -> None:
        """Raises:
        RunDirectoryTaken: as check_in_place.
        """
        self._file.check_folder()

    def close(self) -> None:
        self._file.close()


def read_ledger(run_dir: Path, through: int | None = None) -> list[dict[str, Any]]:
    """Its lines, oldest first; no file is no lines, and a torn last line, left by a kill, is left
    out.

    Args:
        through: lines up to this step alone; damage after them is of no account. None: all.

    Raises:
        LedgerError: an earlier line is none of ours.
        RunDirectoryError: the file is a link or a special file.
        OSError: the file cannot be read.
    """
    try:
        return read_lines(
            run_dir / LEDGER, _line, step=lambda line: int(line["step"]), through=through
        )
    except DataError as error:
        raise LedgerError(str(error)) from error


def _line(value: Any) -> dict[str, Any]:
    try:
        line = {
            "step": whole_number(value["step"], "step"),
            "trained": value["trained"],
            "passed_over": value["passed_over"],
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError("no line of a ledger") from error
    for uids in (line["trained"], line["passed_over"]):
        if not isinstance(uids, list) or not all(isinstance(uid, str) for uid in uids):
            raise ValueError("no line of a ledger")
    return line


def check_ledger(run_dir: Path, steps: int, drawn: Iterable[str]) -> None:
    """Every step once, every prompt drawn until then once, and no other.

    Args:
        steps: optimizer steps that are done.
        drawn: uids up to the data cursor, as drawn_uids gives them.

    Raises:
        LedgerError: naming what is missing, twice, or unknown.
    """
    lines = read_ledger(run_dir)
    found = Counter(uid for line in lines for uid in (*line["trained"], *line["passed_over"]))
    expected = set(drawn)
    problems = {
        "steps": []
        if [line["step"] for line in lines] == list(range(1, steps + 1))
        else [f"not each of 1 ... {steps} once"],
        "used twice": [uid for uid, count in found.items() if count > 1],
        "never used": sorted(expected - found.keys()),
        "not drawn": sorted(found.keys() - expected),
    }
    told = [f"{what}: {', '.join(which[:5])}" for what, which in problems.items() if which]
    if told:
        raise LedgerError(f"{run_dir / LEDGER}: {'; '.join(told)}")


def drawn_uids(prompts: Sequence[Prompt], seed: int, cursor: Mapping[str, Any]) -> list[str]:
    """The uids before a data cursor, in the order in which they are drawn, without those that are
    owed.

    Args:
        prompts: all of the data, in its order.
        cursor: state_dict of the run's PromptSource.
    """
    number = num_drawn(prompts, cursor)
    drawn = PromptSource(prompts, seed).next_batch(number)
    owed = set(cursor["owed"])
    return [prompt.uid for prompt in drawn if prompt.uid not in owed]


def check_cursor(run_dir: Path, prompts: Sequence[Prompt], cursor: Mapping[str, Any]) -> None:
    """Refuse a cursor so far beyond what the ledger records that the prompts before it would fill
    the memory.

    Raises:
        LedgerError: names both numbers.
    """
    recorded = sum(len(line["trained"]) + len(line["passed_over"]) for line in read_ledger(run_dir))
    number = num_drawn(prompts, cursor)
    if number > 2 * recorded + FAR:
        raise LedgerError(
            f"{run_dir / LEDGER}: records {recorded} prompts, but the checkpoint's cursor stands "
            f"at {number}"
        )


def num_drawn(prompts: Sequence[Prompt], cursor: Mapping[str, Any]) -> int:
    """How many prompts a run drew until a data cursor, those that are owed included."""
    return cursor["epoch"] * len(prompts) + cursor["position"]
