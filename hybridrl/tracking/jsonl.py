"""metrics.jsonl and samples/step_NNNNNN.jsonl: the run's own record, and its readers."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from hybridrl.durable import append, replace_text
from hybridrl.errors import DataError
from hybridrl.types import FinishReason, RunInfo, Sample

METRICS = "metrics.jsonl"
SAMPLES = "samples"


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Every row of a run, oldest first; null reads as NaN, a torn last line is left out, no file is no rows.

    Raises:
        DataError: a line before the last one is no JSON object with train/step.
    """
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in _read(Path(run_dir) / METRICS, needed="train/step")
    ]


def read_samples(run_dir: str | Path) -> list[list[Sample]]:
    """The kept rollouts of every evaluation, oldest first.

    Raises:
        DataError: a file holds something else.
    """
    return [
        [
            Sample(
                step=row["step"],
                uid=row["uid"],
                prompt=row["prompt"],
                response=row["response"],
                reward=math.nan if row["reward"] is None else row["reward"],
                finish_reason=FinishReason(row["finish_reason"]),
                question=row.get("question", ""),
                answer=row.get("answer"),
            )
            for row in _read(path, needed="finish_reason")
        ]
        for path in sorted((Path(run_dir) / SAMPLES).glob("step_*.jsonl"))
    ]


class JsonlSink:
    """Appends one JSON object a line, on disk row by row, so that a killed run keeps every finished row and a checkpoint those before it.

    A resumed run first cuts what lies after its checkpoint, so the file holds each step exactly once.
    """

    def __init__(self) -> None:
        self._dir: Path | None = None
        self._file: FileIO | None = None

    def start(self, info: RunInfo) -> None:
        """Open the files of info.run_dir, less all that is newer than step info.first_step (0: all).

        Raises:
            DataError: the metrics file is damaged before its last line.
        """
        self.close(0)
        self._dir = Path(info.run_dir)
        (self._dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        metrics = self._dir / METRICS
        kept = [
            row
            for row in _read(metrics, needed="train/step")
            if 0 < info.first_step >= row["train/step"]
        ]
        replace_text(metrics, "".join(map(_line, kept)))
        for path in (self._dir / SAMPLES).glob("step_*.jsonl"):
            if not 0 < info.first_step >= int(path.stem.removeprefix("step_")):
                path.unlink()
        self._file = metrics.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float]) -> None:
        assert self._file is not None, "log before start"
        row = {
            "train/step": int(metrics["train/step"]),
            **{k: v for k, v in metrics.items() if k != "train/step"},
        }
        append(self._file, _line(row))

    def samples(self, rows: Sequence[Sample]) -> None:
        assert self._dir is not None, "samples before start"
        if rows:
            replace_text(
                self._dir / SAMPLES / f"step_{rows[0].step:06d}.jsonl",
                "".join(_line(asdict(row)) for row in rows),
            )

    def close(self, exit_code: int) -> None:
        if self._file is not None:
            self._file.close()


def _read(path: Path, needed: str) -> list[dict[str, Any]]:
    """The objects of a file; a process killed while writing leaves at most one torn line, the last."""
    rows: list[dict[str, Any]] = []
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}); repair or remove the line"
            ) from error
        if not isinstance(row, dict) or needed not in row:
            raise DataError(
                f"{path}, line {number}: no object with {needed}; repair or remove the line"
            )
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"


def _plain(value: Any) -> Any:
    """A number JSON can hold: numpy scalars as float, NaN and infinities, which JSON lacks, as None."""
    if value is None or isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None
