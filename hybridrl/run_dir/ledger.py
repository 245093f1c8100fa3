"""ledger.jsonl: the prompts that each step used, and a check that each was used exactly once."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridrl.core.errors import DataError, LedgerError
from hybridrl.core.files import replace_text
from hybridrl.core.json_lines import Appender, read_lines, whole_number
from hybridrl.data.mixture import cursors_of
from hybridrl.types import Prompt

LEDGER = "ledger.jsonl"
FAR = 1_000_000
"""How many prompts a cursor may exceed twice the number of recorded ones before it is refused."""


class Ledger:
    """Writes one line per step, which is on disk before the checkpoint of the step is.

    Example of a line: {"step": 1, "trained": ["a@0"], "passed_over": ["b@0"]}. A resumed run first
    removes the lines of the steps after its checkpoint, as it does these steps again.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open the ledger and remove the lines after step `first_step`.

        Args:
            first_step: the number of steps that are done: 0, or that of the checkpoint.

        Raises:
            LedgerError: the file is damaged before the end of that step.
            OSError: the file cannot be read (it is then unchanged) or cannot be written.
        """
        path = run_dir / LEDGER
        lines = read_ledger(run_dir, first_step) if first_step else []
        replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = Appender(path)

    def record(self, step: int, trained: Sequence[str], passed_over: Sequence[str] = ()) -> None:
        """Append the line of a step.

        Args:
            trained: uids of the prompts that were trained on.
            passed_over: uids of those that were drawn and not trained on: their responses were
                aborted, failed, or had equal rewards.
        """
        line = {"step": step, "trained": list(trained), "passed_over": list(passed_over)}
        self._file.append(json.dumps(line) + "\n")

    def check_in_place(self) -> None:
        """Check that the path of the ledger still leads to the file that is open.

        Raises:
            RunDirectoryTaken: another directory has the path of the run's.
            RunDirectoryError: the ledger or the whole directory was removed, moved or replaced.
        """
        self._file.check()

    def check_folder(self) -> None:
        """Check that no other directory has the path of the run's.

        Raises:
            RunDirectoryTaken: another one has.
        """
        self._file.check_folder()

    def close(self) -> None:
        self._file.close()


def read_ledger(run_dir: Path, through: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ledger, oldest first; empty if there is no such file.

    An incomplete last line, as a killed run may write it, is ignored.

    Args:
        through: return only lines up to this step, and ignore damage after them. None: all lines.

    Raises:
        LedgerError: a line before the last one does not have the form of a ledger's line.
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
    """Check that the ledger has each step once, each drawn prompt once, and no other prompt.

    Args:
        steps: optimizer steps that are done.
        drawn: the uids before the data cursor, as drawn_uids returns them.

    Raises:
        LedgerError: names prompts that are missing, used twice, or were never drawn.
    """
    lines = read_ledger(run_dir)
    uses = Counter(uid for line in lines for uid in (*line["trained"], *line["passed_over"]))
    expected = set(drawn)
    each_step_once = [line["step"] for line in lines] == list(range(1, steps + 1))
    problems = {
        "steps": [] if each_step_once else [f"not each of 1 ... {steps} once"],
        "used twice": [uid for uid, count in uses.items() if count > 1],
        "never used": sorted(expected - uses.keys()),
        "not drawn": sorted(uses.keys() - expected),
    }
    messages = [f"{kind}: {', '.join(uids[:5])}" for kind, uids in problems.items() if uids]
    if messages:
        raise LedgerError(f"{run_dir / LEDGER}: {'; '.join(messages)}")


def drawn_uids(prompts: Sequence[Prompt], seed: int, cursor: Mapping[str, Any]) -> list[str]:
    """The uids before a data cursor, of each source in the order in which they are drawn.

    Prompts that were put back, and so will be drawn again, are not among them.

    Args:
        prompts: all training prompts, in the order of the data.
        cursor: state_dict of the run's PromptSource or PromptMixture.
    """
    returned = set(cursor["owed"])
    drawn = [
        prompt.uid
        for source, part in cursors_of(prompts, seed, cursor)
        for prompt in source.next_batch(num_drawn(source.prompts, part))
    ]
    return [uid for uid in drawn if uid not in returned]


def check_cursor(run_dir: Path, prompts: Sequence[Prompt], cursor: Mapping[str, Any]) -> None:
    """Refuse a cursor so large that the list of the prompts before it would fill the memory.

    Raises:
        LedgerError: the cursor is far beyond the prompts that the ledger records.
    """
    recorded = sum(len(line["trained"]) + len(line["passed_over"]) for line in read_ledger(run_dir))
    number = sum(num_drawn(source.prompts, part) for source, part in cursors_of(prompts, 0, cursor))
    if number > 2 * recorded + FAR:
        raise LedgerError(
            f"{run_dir / LEDGER}: records {recorded} prompts, but the checkpoint's cursor is at "
            f"{number}"
        )


def num_drawn(prompts: Sequence[Prompt], cursor: Mapping[str, Any]) -> int:
    """The number of prompts of one source that a run has drawn at a cursor, including those put
    back.
    """
    return cursor["epoch"] * len(prompts) + cursor["position"]
