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
"""A cursor is refused if it exceeds twice the number of recorded prompts by more than this."""


class Ledger:
    """Writes one line per step, which is on disk before the checkpoint of the step.

    Example of a line: {"step": 1, "trained": ["a@0"], "passed_over": ["b@0"]}. A resumed run first
    removes the lines of the steps after its checkpoint, since it repeats these steps.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open the ledger and remove the lines after step `first_step`.

        Args:
            first_step: the number of steps that are done: 0, or the step of the checkpoint.

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
            passed_over: uids of prompts that were drawn and not trained on, e.g. because their
                responses were aborted, their rewards failed or were equal, or no gradient was
                finite.
        """
        line = {"step": step, "trained": list(trained), "passed_over": list(passed_over)}
        self._file.append(json.dumps(line) + "\n")

    def check_in_place(self) -> None:
        """Check that the path of the ledger still leads to the file that is open.

        Raises:
            RunDirectoryTaken: another directory is at the path of the run directory.
            RunDirectoryError: the ledger or the whole directory was removed, moved or replaced.
        """
        self._file.check()

    def check_folder(self) -> None:
        """Check that no other directory is at the path of the run directory.

        Raises:
            RunDirectoryTaken: another one is.
        """
        self._file.check_folder()

    def close(self) -> None:
        self._file.close()


def read_ledger(run_dir: Path, through: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ledger, oldest first; empty if there is no such file.

    An incomplete last line, as a killed run may write it, is ignored.

    Args:
        through: return only the lines up to this step, and ignore damage after it; None: all lines.

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
        raise ValueError("not a line of a ledger") from error
    for uids in (line["trained"], line["passed_over"]):
        if not isinstance(uids, list) or not all(isinstance(uid, str) for uid in uids):
            raise ValueError("not a line of a ledger")
    return line


def check_ledger(run_dir: Path, steps: int, drawn: Iterable[str]) -> None:
    """Check that the ledger has each step once, each drawn prompt once, and no other prompt.

    Args:
        steps: the number of training steps that are done.
        drawn: the uids before the data cursor, as drawn_uids returns them.

    Raises:
        LedgerError: steps or prompts are missing, used twice, or were never drawn; the message
            names some of the prompts.
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
    """The uids before a data cursor, source by source, in the order in which they are drawn.

    They do not include prompts that were put back and will be drawn again.

    Args:
        prompts: all training prompts, in the order of the data.
        seed: the run's seed.
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
    """Check that a cursor is not so large that a list of the prompts before it would fill the
    memory.

    Raises:
        LedgerError: the cursor is far beyond the number of prompts that the ledger records.
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
