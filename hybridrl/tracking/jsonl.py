"""Writes and reads the run's own record: metrics.jsonl and samples/step_NNNNNN.jsonl."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridrl.core.files import entries, replace_text
from hybridrl.core.json_lines import Appender, read_lines, shortened, whole_number
from hybridrl.types import FinishReason, RunInfo, Sample, TokenSample

METRICS = "metrics.jsonl"
SAMPLES = "samples"
SAMPLES_FILE = re.compile(r"step_(\d{6,18})\.jsonl", re.ASCII)
TOKENS_FILE = re.compile(r"tokens_(\d{6,18})\.jsonl", re.ASCII)


def read_metrics(run_dir: str | Path, through: int | None = None) -> list[dict[str, float]]:
    """Every row of a run's metrics.jsonl, oldest first; empty if there is no such file.

    null is read as NaN. An incomplete last line, which a killed run may leave, is ignored.

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


def read_token_samples(run_dir: str | Path) -> list[list[TokenSample]]:
    """The saved responses with log-ratios of their tokens, for every step that has some, oldest
    first.

    Raises:
        DataError: a line of a file is not such a response.
        RunDirectoryError: a file is a link or a special file.
        OSError: a file cannot be read.
    """
    return [
        read_lines(path, _token_sample, step=lambda sample: sample.step)
        for _, path in samples_files(Path(run_dir), TOKENS_FILE)
    ]


def write_token_samples(run_dir: Path, rows: Sequence[TokenSample]) -> None:
    """Write samples/tokens_NNNNNN.jsonl, NNNNNN being the step of the rows; without rows, write
    nothing.

    Raises:
        OSError: it cannot be written, e.g. because the run directory is gone, which is not made
            anew.
    """
    if rows:
        (run_dir / SAMPLES).mkdir(exist_ok=True)
        path = run_dir / SAMPLES / f"tokens_{rows[0].step:06d}.jsonl"
        replace_text(path, "".join(_line(asdict(row)) for row in rows))


def samples_files(run_dir: Path, pattern: re.Pattern[str] = SAMPLES_FILE) -> list[tuple[int, Path]]:
    """(step, file) of every file of samples that matches `pattern`, oldest first."""
    paths = [(pattern.fullmatch(path.name), path) for path in entries(run_dir / SAMPLES)]
    return sorted((int(match[1]), path) for match, path in paths if match)


def _row(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or "train/step" not in value:
        raise ValueError("not an object with train/step")
    row: dict[str, float] = {"train/step": whole_number(value["train/step"], "train/step")}
    for key, number in value.items():
        if key != "train/step":
            row[key] = _number(number, key)
    return row


def _number(value: Any, key: str) -> float:
    """The value as a number; NaN for null.

    Raises:
        ValueError: the value is not a number, or an integer that is too large.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shortened(key)} is {shortened(value)}, not a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{shortened(key)} is {shortened(value)}, too large a number")
    return value


def _sample(value: Any) -> Sample:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for key in ("uid", "prompt", "response", "finish_reason"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is missing or not text")
    question = value.get("question", "")
    answer = value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise ValueError("question or answer is not text")
    parts = value.get("parts", {})
    if not isinstance(parts, dict):
        raise ValueError("parts is not an object")
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


def _token_sample(value: Any) -> TokenSample:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for key in ("uid", "prompt", "teacher"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is missing or not text")
    tokens = value.get("tokens")
    ratios = value.get("log_ratios")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens is not a list of texts")
    if not isinstance(ratios, list) or len(ratios) != len(tokens):
        raise ValueError("log_ratios is not a list with a number for each token")
    return TokenSample(
        step=whole_number(value.get("step"), "step"),
        uid=value["uid"],
        prompt=value["prompt"],
        teacher=value["teacher"],
        tokens=tuple(tokens),
        log_ratios=tuple(_number(ratio, "log_ratios") for ratio in ratios),
        reward=_number(value.get("reward"), "reward"),
    )


class JsonlSink:
    """Appends one JSON object per line, and syncs each row to disk.

    So a killed run loses no finished row. A resumed run first removes the rows after its
    checkpoint, so the file contains each step exactly once.
    """

    def __init__(self) -> None:
        self._dir: Path | None = None
        self._file: Appender | None = None

    def start(self, info: RunInfo) -> None:
        """Open the metrics file of info.run_dir, and remove rows and samples after info.first_step.

        Raises:
            DataError: the metrics file is damaged before the end of that step.
            OSError: the file cannot be read, in which case it is unchanged, or cannot be written.
        """
        self.close(0)
        self._dir = Path(info.run_dir)
        (self._dir / SAMPLES).mkdir(exist_ok=True)
        metrics = self._dir / METRICS
        rows = read_metrics(self._dir, info.first_step) if info.first_step else []
        replace_text(metrics, "".join(map(_line, rows)))
        files = samples_files(self._dir) + samples_files(self._dir, TOKENS_FILE)
        for step, path in files:
            if not 0 < info.first_step >= step:
                path.unlink()
        self._file = Appender(metrics)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row and sync it to disk.

        Raises:
            RunDirectoryError: the file or its directory was removed, moved or replaced.
        """
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
    """The value in types of JSON: numpy scalars become float, NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return float(value) if math.isfinite(value) else None
