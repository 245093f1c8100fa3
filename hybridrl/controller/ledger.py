"""ledger.jsonl: which prompts each step trained on, and the proof that none was trained twice or left out."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridrl.data.prompts import PromptSource
from hybridrl.durable import append, replace_text
from hybridrl.errors import LedgerError
from hybridrl.types import Prompt

LEDGER = "ledger.jsonl"


class Ledger:
    """One line a step, on disk before the step's checkpoint is: {"step": 1, "trained": ["a@0"], "passed_over": ["b@0"]}.

    A resumed run first cuts the steps after its checkpoint, which it takes again.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Args: first_step: steps that are done, 0 or what the checkpoint says.

        Raises:
            LedgerError: the file is damaged before its last line.
        """
        path = run_dir / LEDGER
        kept = [line for line in read_ledger(run_dir) if line["step"] <= first_step]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)

    def record(self, step: int, trained: Sequence[str], passed_over: Sequence[str] = ()) -> None:
        """Args: passed_over: prompts that were drawn and not trained on, as aborted, failed or with equal rewards."""
        append(
            self._file,
            json.dumps({"step": step, "trained": list(trained), "passed_over": list(passed_over)})
            + "\n",
        )

    def close(self) -> None:
        self._file.close()


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Its lines, oldest first; no file is no lines, and a torn last line, left by a kill, is left out.

    Raises:
        LedgerError: an earlier line is none of ours.
    """
    path = run_dir / LEDGER
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    found = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            found.append(
                {
                    "step": int(line["step"]),
                    "trained": list(line["trained"]),
                    "passed_over": list(line["passed_over"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{path}, line {number}: no line of a ledger; repair or remove it"
            ) from error
    return found


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
    """The uids before a data cursor, in the order in which they are drawn, without those that are owed.

    Args:
        prompts: all of the data, in its order.
        cursor: state_dict of the run's PromptSource.
    """
    drawn = PromptSource(prompts, seed).next_batch(
        cursor["epoch"] * len(prompts) + cursor["position"]
    )
    owed = set(cursor["owed"])
    return [prompt.uid for prompt in drawn if prompt.uid not in owed]
