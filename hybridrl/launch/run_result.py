"""The result of a finished run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hybridrl.report.run_report import write_report
from hybridrl.run_dir.checkpoint import step_folders
from hybridrl.tracking.jsonl import read_metrics

log = logging.getLogger(__name__)


class ExitReason(StrEnum):
    """Why a call of `train` returned."""

    finished = "finished"  # it trained up to train.steps
    already_finished = "already_finished"  # run.dir held a run with all of its steps
    stopped = "stopped"  # on_step raised StopTraining before the last step


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Metrics and files of a run that has done all of its steps, or that on_step ended.

    Example: result.metrics["eval/accuracy"] is 0.56 and result.export is
    Path("/runs/a/export/step_000100").
    """

    exit_reason: ExitReason
    run_dir: Path
    metrics: Mapping[str, float]
    """the last row of metrics.jsonl; NaN where a value was not finite"""
    checkpoint: Path | None
    """the newest checkpoint; None: the run has none"""
    export: Path | None
    """the final model as a Hugging Face folder; None: checkpoint.export is false"""
    report: Path | None
    """report.html; None: it could not be written, which the console says"""
    accuracy_before: float | None
    """held-out accuracy in the run's first evaluation; None: there was none"""
    accuracy_after: float | None
    """held-out accuracy in its last evaluation; None: there were fewer than two"""
    teacher_accuracy: Mapping[str, float]
    """held-out accuracy by the teacher's name, for teachers that were measured"""


def run_result(run_dir: Path, exported: Path | None, reason: ExitReason) -> RunResult:
    """The result of a finished run, whose report is written here. A report that cannot be written
    does not make the run fail.
    """
    report: Path | None = None
    try:
        report = write_report(run_dir)
    except Exception as error:  # drawing depends on a large library, fonts and the disk
        log.exception("the report of %s could not be written", run_dir)
        print(
            f"the run is finished, but its report could not be written ({type(error).__name__}: "
            f"{error}); 'hybridrl report {run_dir}' tries again"
        )
    rows = read_metrics(run_dir)
    checkpoints = step_folders(run_dir)
    evaluated = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return RunResult(
        exit_reason=reason,
        run_dir=run_dir,
        metrics=rows[-1] if rows else {},
        checkpoint=checkpoints[-1] if checkpoints else None,
        export=exported,
        report=report,
        accuracy_before=evaluated[0] if evaluated else None,
        accuracy_after=evaluated[-1] if len(evaluated) > 1 else None,
        teacher_accuracy={
            k.rsplit("/", 1)[1]: v
            for row in rows
            for k, v in row.items()
            if k.startswith("eval/accuracy_teacher/")
        },
    )
