"""metrics.jsonl and samples/step_NNNNNN.jsonl, the run's own record: writing and reading them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridrl.core.files import entries, replace_text
from hybridrl.core.json_lines import Appender, read_lines, shortened, whole_number
from hybridrl.types import FinishReason, RunInfo, Sample

METRICS = "metrics.jsonl"
SAMPLES = "samples"
SAMPLES_FILE = re.compile(r"step_(\d{6,18})\.jsonl", re.ASCII)


def read_metrics(run_dir: str | Path, through: int | None = None) -> list[dict[str, float]]:
    """Every row of a run's metrics.jsonl, oldest first; empty if there is no such file.

    null is read as NaN. An incomplete last line, as a killed run may write it, is ignored.

    Args:
        through: return only rows up to this step, and ignore damage after them. None: all rows.

    Raises:
        DataError: a line before the last one is not a row of numbers with train/step.
        RunDirectoryError: the file is a link or a special file.
        OSError: the file cannot be read.
    """
    return read_lines(
        Path(run_dir) / METRICS, _row, step=lambda row: int(row["train/step"]), through=through
    )


def read_samples(run_dir: str | Path) -> list[list[Sample]]:
    """The saved samples of every evaluation, oldest first.

    Raises:
        DataError: a line of a file is not a sample.
        RunDirectoryError: a file is a link or a special file.
        OSError: a file cannot be read.
    """
    return [
        read_lines(path, _sample, step=lambda sample: sample.step)
        for _, path in samples_files(Path(run_dir))
    ]


def samples_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of every evaluation, oldest first; files with other names are ignored."""
    paths = [(SAMPLES_FILE.fullmatch(path.name), path) for path in entries(run_dir / SAMPLES)]
    return sorted((int(match[1]), path) for match, path in paths if match)


def _row(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or "train/step" not in value:
        raise ValueError("no object with train/step")
    row: dict[str, float] = {"train/step": whole_number(value["train/step"], "train/step")}
    for key, number in value.items():
        if key != "train/step":
            row[key] = _number(number, key)
    return row


def _number(value: Any, key: str) -> float:
    """A number; NaN for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shortened(key)} is {shortened(value)}, not a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{shortened(key)} is {shortened(value)}, too large a number")
    return value


def _sample(value: Any) -> Sample:
    if not isinstance(value, dict):
        raise ValueError("no object with finish_reason")
    for key in ("uid", "prompt", "response", "finish_reason"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"no object with {key}, a text")
    question = value.get("question", "")
    answer = value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise ValueError("question or answer is no text")
    parts = value.get("parts", {})
    if not isinstance(parts, dict):
        raise ValueError("parts is no object")
    return Sample(
        step=whole_number(value.get("step"), "step"),
        uid=value["uid"],
        prompt=value["prompt"],
        response=value["response"],
        reward=_number(value.get("reward"), "reward"),
        finish_reason=FinishReason(value["finish_reason"]),
        question=question,
        answer=answer,
        parts={name: _number(number, name) for name, number in parts.items()},
    )


class JsonlSink:
    """Appends one JSON object per line, and syncs each row to disk.

    A killed run therefore loses no finished row. A resumed run first removes the rows after its
    checkpoint, so the file holds each step exactly once.
    """

    def __init__(self) -> None:
        self._dir: Path | None = None
        self._file: Appender | None = None

    def start(self, info: RunInfo) -> None:
        """Open the files of info.run_dir, without the rows and samples after info.first_step.

        Raises:
            DataError: the metrics file is damaged before the end of that step.
            OSError: the file cannot be read (it is then unchanged) or cannot be written.
        """
        self.close(0)
        self._dir = Path(info.run_dir)
        (self._dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        metrics = self._dir / METRICS
        rows = read_metrics(self._dir, info.first_step) if info.first_step else []
        replace_text(metrics, "".join(map(_line, rows)))
        for step, path in samples_files(self._dir):
            if not 0 < info.first_step >= step:
                path.unlink()
        self._file = Appender(metrics)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Raises: RunDirectoryError: the file or its directory was removed, moved or replaced."""
        assert self._file is not None, "log before start"
        self._file.check()
        row = {
            "train/step": int(metrics["train/step"]),
            **{k: v for k, v in metrics.items() if k != "train/step"},
        }
        self._file.append(_line(row))

    def samples(self, rows: Sequence[Sample]) -> None:
        assert self._dir is not None and self._file is not None, "samples before start"
        if rows:
            self._file.check()
            (self._dir / SAMPLES).mkdir(exist_ok=True)
            replace_text(
                self._dir / SAMPLES / f"step_{rows[0].step:06d}.jsonl",
                "".join(_line(asdict(row)) for row in rows),
            )

    def close(self, exit_code: int) -> None:
        if self._file is not None:
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"


def _plain(value: Any) -> Any:
    """A value that JSON can hold: numpy scalars become float, NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None
