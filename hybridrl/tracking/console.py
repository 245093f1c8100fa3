"""What a run prints: a live display on a terminal, one plain line per step elsewhere."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.symptoms import Watch, watch
from hybridrl.types import RunInfo, Sample

TEACHER = "eval/accuracy_teacher/"
PHASES = ("rollout", "score", "reward", "learn", "sync", "eval", "save")


class ConsoleSink:
    """Prints progress to a text stream, with Rich's live display only if that is a terminal.

    Example of the plain lines, as under `ray job logs`; the first is one line:
        step  40/200  reward 0.412  KL/token 0.0312  lambda 1.00  tok/s 8,123
            4.2 s (rollout 2.1, learn 1.2)  11 min 3 s left
        step 40  eval accuracy 51.2 % (teacher 74.0 %, start 33.1 %)

    Args:
        stream: where to print; None: sys.stdout, as it is when `start` is called.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._start_accuracy: float | None = None  # on held-out problems, before training
        self._start_loss: float | None = None  # on held-out data, before training
        self._teachers: dict[str, float] = {}  # accuracy by the teacher's name
        self._accuracy: float | None = None  # of the last evaluation
        self._total = 0
        self._first = 0
        self._began: float | None = None  # when the first step of this process was logged
        self._watch = Watch()

    def start(self, info: RunInfo) -> None:
        self._stream = self._stream or sys.stdout
        self._total = info.total_steps
        self._first = info.first_step
        self._began = None
        self._watch = Watch()
        if info.first_step > 0:
            rows = read_metrics(info.run_dir)
            self._watch = watch(rows)
            for row in rows:
                self._remember_levels(row)
            self.notice(
                f"{info.name}: continues after step {info.first_step} of {info.total_steps}, in "
                f"{info.run_dir}"
            )
        else:
            self.notice(f"{info.name}: {info.total_steps} steps, in {info.run_dir}")
        if self._stream.isatty() and self._live is None:
            self._open_display()

    def notice(self, text: str) -> None:
        """Print one line, above the live display if there is one."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            print(text, file=self._stream or sys.stdout, flush=True)

    def log(self, metrics: Mapping[str, float]) -> None:
        self._remember_levels(metrics)
        step = int(metrics["train/step"])
        if self._live is not None and self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
            self._live.update(Group(self._progress, _status(metrics, self._accuracy)), refresh=True)
        elif step > 0:
            self.notice(self._step_line(step, metrics))
        if "eval/accuracy" in metrics:
            self._print_evaluation(step, metrics["eval/accuracy"])
        if "eval/loss" in metrics:
            self._highlight(self._loss_line(step, metrics))
        if (sentence := self._watch.see(metrics)) is not None:
            self.notice(f"warning: {sentence}")

    def samples(self, rows: Sequence[Sample]) -> None:
        """Do nothing: samples are shown in the report, not on the console."""

    def close(self, exit_code: int) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if (sentence := self._watch.summary()) is not None:
            self.notice(f"warning: {sentence}")
        self.notice("done" if exit_code == 0 else "stopped")

    def _open_display(self) -> None:
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            expand=True,
            auto_refresh=False,
        )
        self._progress.add_task("train", total=self._total, completed=self._first)
        self._live = Live(self._progress, console=Console(file=self._stream), refresh_per_second=2)
        self._live.start()

    def _remember_levels(self, metrics: Mapping[str, float]) -> None:
        """Store what evaluations are compared with: the first accuracy and the teachers'."""
        if metrics["train/step"] == 0:
            self._start_accuracy = metrics.get("eval/accuracy")
            self._start_loss = metrics.get("eval/loss")
            self._teachers = {
                key.removeprefix(TEACHER): value
                for key, value in metrics.items()
                if key.startswith(TEACHER)
            }
        self._accuracy = metrics.get("eval/accuracy", self._accuracy)

    def _step_line(self, step: int, metrics: Mapping[str, float]) -> str:
        width = len(str(self._total))
        parts = [
            f"step {step:>{width}}/{self._total}",
            *(f"{name} {text}" for name, text in _columns(metrics)),
        ]
        if phases := _phases(metrics):
            parts.append(f"{metrics.get('time/step_s', math.nan):.1f} s ({phases})")
        parts.append(f"{duration(self._pace(step, metrics) * max(self._total - step, 0))} left")
        return "  ".join(parts)

    def _pace(self, step: int, metrics: Mapping[str, float]) -> float:
        """Seconds per step: with evaluations and checkpoints, without the start of the workers."""
        if self._began is None:
            self._began = time.monotonic()
            self._first = step
        if step == self._first:
            return metrics.get("time/step_s", 0.0)
        return (time.monotonic() - self._began) / (step - self._first)

    def _print_evaluation(self, step: int, accuracy: float) -> None:
        levels = [f"teacher {name} {value:.1%}" for name, value in self._teachers.items()]
        if len(levels) == 1:
            levels = [f"teacher {value:.1%}" for value in self._teachers.values()]
        if step > 0 and self._start_accuracy is not None:
            levels.append(f"start {self._start_accuracy:.1%}")
        line = f"step {step}  eval accuracy {accuracy:.1%}" + (
            f" ({', '.join(levels)})" if levels else ""
        )
        self._highlight(line.replace("%", " %"))

    def _loss_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The line of an evaluation on the responses of the held-out data."""
        line = f"step {step}  held-out loss {metrics['eval/loss']:.4f}"
        if step > 0 and self._start_loss is not None:
            line += f" (start {self._start_loss:.4f})"
        if "eval/pair_accuracy" in metrics:
            share = f"{metrics['eval/pair_accuracy']:.1%}".replace("%", " %")
            line += f", {share} of pairs ranked right, margin {metrics['eval/pair_margin']:.3f}"
        return line

    def _highlight(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(line, style="bold green"))
        else:
            self.notice(line)


def duration(seconds: float) -> str:
    """Seconds as text. Example: duration(754) == "12 min 34 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _columns(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers that the console shows of one row, as (name, text)."""
    formats = (
        ("reward/mean", "reward", "{:.3f}"),
        ("pair/loss", "loss", "{:.4f}"),
        ("pair/accuracy", "pairs ranked right", "{:.1%}"),
        ("pair/margin", "margin", "{:.3f}"),
        ("nll/token", "nll/token", "{:.4f}"),
        ("kl/token" if "kl/token" in metrics else "kl/sampled", "KL/token", "{:.4f}"),
        ("schedule/lambda", "lambda", "{:.2f}"),
        ("perf/tokens_per_s", "tok/s", "{:,.0f}"),
    )
    shown = [entry for entry in formats if entry[0] in metrics]
    if "reward/mean" not in metrics:  # without a reward, its weight means nothing
        shown = [entry for entry in shown if entry[0] != "schedule/lambda"]
    if "pair/loss" in metrics:  # nll/token would average chosen and rejected responses
        shown = [entry for entry in shown if entry[0] != "nll/token"]
    return [(name, form.format(metrics[key]).replace("%", " %")) for key, name, form in shown]


def _phases(metrics: Mapping[str, float]) -> str:
    shown = [(name, metrics.get(f"time/{name}_s", 0.0)) for name in PHASES]
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in shown if seconds > 0)


def _status(metrics: Mapping[str, float], accuracy: float | None) -> Table:
    """The lower part of the live display: the numbers of the last row under their names."""
    cells = _columns(metrics)
    if accuracy is not None:
        cells.insert(1, ("accuracy", f"{accuracy:.1%}".replace("%", " %")))
    if phases := _phases(metrics):
        cells.append((f"step {metrics.get('time/step_s', math.nan):.1f} s", phases))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name, _ in cells:
        table.add_column(name, no_wrap=False)
    table.add_row(*(text for _, text in cells))
    return table
