"""The output of a run: a live display on a terminal, plain lines elsewhere, and a file with every
line.
"""

import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
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

from hybridrl.core import redact
from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.symptoms import Watch, watch
from hybridrl.types import RunInfo, Sample

LOG = Path("logs") / "console.log"
"""The file in the run directory with every line, printed or not."""
TEACHER = "eval/accuracy_teacher/"
NOT_SETS = ("accuracy_teacher", "accuracy_source")
"""Words at the position of a set's name in metrics of a teacher or a data source."""
ABOVE_ZERO = ("engine/rollout/waiting", "engine/rollout/preemptions")
"""Metrics that are shown only if they are above 0."""
PHASES = ("rollout", "score", "reward", "learn", "sync", "eval", "save")

log = logging.getLogger(__name__)


class ConsoleSink:
    """Prints progress to a text stream, with Rich's live display only if that is a terminal.

    Elsewhere it prints the first and the last step, and between them one step every `every_s`
    seconds. Notices, warnings and evaluations are always printed. logs/console.log has every line
    of every step, with the time.

    Example of plain lines, as `ray job logs` shows them; the first two rows are one line:
        step  40/200  reward 0.412  KL/token 0.0312  lambda 1.00  cut off 3.1 %  grad norm 0.83
            lr 5.0e-04  tok/s 8,123  KV cache 61 %  4.2 s (rollout 2.1, learn 1.2)  11 min 3 s left
        step 40  eval accuracy 51.2 % (teacher 74.0 %, start 33.1 %)

    Args:
        stream: where to print; None: the sys.stdout of the time when `start` is called.
        every_s: seconds between two printed steps; 0: each step is printed.
        clock: returns seconds since an arbitrary time.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._printed = -math.inf  # the time when a step was last printed
        self._file: TextIO | None = None  # logs/console.log
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._start_accuracy: float | None = None  # on held-out problems, before training
        self._start_loss: float | None = None  # on held-out data, before training
        self._teachers: dict[str, float] = {}  # accuracy by the teacher's name
        self._accuracy: float | None = None  # of the last evaluation
        self._total = 0
        self._first = 0
        self._began: float | None = None  # the time when this process logged its first step
        self._watch = Watch()

    def start(self, info: RunInfo) -> None:
        again = self._total > 0  # this call continues the run from a checkpoint
        self._stream = self._stream or sys.stdout
        self._open_log(Path(info.run_dir) / LOG)
        self._total = info.total_steps
        self._first = info.first_step
        self._began = None
        self._printed = -math.inf
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
        if self._every_s > 0 and not self._stream.isatty() and not again:
            self.notice(f"one step every {self._every_s:g} s is printed; {LOG} has every step")
        if self._stream.isatty() and self._live is None:
            self._open_display()

    def notice(self, text: str) -> None:
        """Print one line, above the live display if there is one."""
        self._record(text)
        self._print(text)

    def _print(self, text: str, style: str = "") -> None:
        if self._live is not None:
            self._live.console.print(Text(text, style=style))
        else:
            print(text, file=self._stream or sys.stdout, flush=True)

    def _open_log(self, path: Path) -> None:
        if self._file is not None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            log.warning("%s: cannot be opened (%s); lines are only printed", path, error.strerror)

    def _record(self, text: str) -> None:
        """Append a line to the file. An error, e.g. a full disk, does not end the run."""
        if self._file is None:
            return
        try:
            stamp = datetime.now().isoformat(" ", "seconds")
            self._file.write(f"{stamp}  {redact.text(text)}\n")
            self._file.flush()
        except OSError as error:
            log.warning("%s: cannot be written (%s); lines are only printed", LOG, error.strerror)
            self._file = None

    def log(self, metrics: Mapping[str, float]) -> None:
        self._remember_levels(metrics)
        step = int(metrics["train/step"])
        if self._live is not None and self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
            self._live.update(Group(self._progress, _status(metrics, self._accuracy)), refresh=True)
        if step > 0:
            self._log_step(step, metrics)
        if "eval/accuracy" in metrics:
            self._print_evaluation(step, metrics["eval/accuracy"])
        if "eval/loss" in metrics:
            self._highlight(self._loss_line(step, metrics))
        for line in set_lines(metrics):
            self._highlight(f"step {step}  {line}")
        if (sentence := self._watch.see(metrics)) is not None:
            self.notice(f"warning: {sentence}")

    def _log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        line = self._step_line(step, metrics)
        self._record(line)
        now = self._clock()
        due = now - self._printed >= self._every_s or step == self._total
        if due and self._live is None:
            self._print(line)
            self._printed = now

    def samples(self, rows: Sequence[Sample]) -> None:
        """Do nothing: samples are shown in the report, not on the console."""

    def close(self, exit_code: int) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if (sentence := self._watch.summary()) is not None:
            self.notice(f"warning: {sentence}")
        self.notice("done" if exit_code == 0 else "stopped")
        if self._file is not None:
            self._file.close()
            self._file = None

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
        """Store the values with which evaluations are compared: those before training, and the
        teachers' accuracies.
        """
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
        """Seconds per step, including evaluations and checkpoints, without the workers' start."""
        if self._began is None:
            self._began = self._clock()
            self._first = step
        if step == self._first:
            return metrics.get("time/step_s", 0.0)
        return (self._clock() - self._began) / (step - self._first)

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
        self._record(line)
        self._print(line, style="bold green")


def set_lines(metrics: Mapping[str, float]) -> list[str]:
    """A line for each held-out set of an evaluation.

    Example: "set hard: accuracy 31.2 % +- 2.1 %, loss 0.5310".
    """
    parts: dict[str, list[str]] = {}
    for key, value in metrics.items():
        match = re.fullmatch(r"eval/(\w+)/(accuracy|loss|pair_accuracy)", key)
        if match is None or match[1] in NOT_SETS:
            continue
        if match[2] == "loss":
            text = f"loss {value:.4f}"
        elif match[2] == "pair_accuracy":
            text = f"{100 * value:.1f} % of pairs ranked right"
        else:
            stderr = metrics.get(f"{key}_stderr", math.nan)
            text = f"accuracy {100 * value:.1f} % +- {100 * stderr:.1f} %"
        parts.setdefault(match[1], []).append(text)
    return [f"set {name}: {', '.join(texts)}" for name, texts in parts.items()]


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
        ("rollout/truncated_frac", "cut off", "{:.1%}"),
        ("train/grad_norm", "grad norm", "{:.3g}"),
        ("train/lr", "lr", "{:.1e}"),
        ("perf/tokens_per_s", "tok/s", "{:,.0f}"),
        ("engine/rollout/kv_use", "KV cache", "{:.0%}"),
        ("engine/rollout/waiting", "waiting", "{:.0f}"),
        ("engine/rollout/preemptions", "preempted", "{:.0f}"),
    )
    shown = [entry for entry in formats if entry[0] in metrics]
    if "reward/mean" not in metrics:  # without a reward, its weight has no meaning
        shown = [entry for entry in shown if entry[0] != "schedule/lambda"]
    shown = [e for e in shown if e[0] not in ABOVE_ZERO or metrics[e[0]] > 0]
    if "pair/loss" in metrics:  # nll/token would average chosen and rejected responses
        shown = [entry for entry in shown if entry[0] != "nll/token"]
    return [(name, form.format(metrics[key]).replace("%", " %")) for key, name, form in shown]


def _phases(metrics: Mapping[str, float]) -> str:
    shown = [(name, metrics.get(f"time/{name}_s", 0.0)) for name in PHASES]
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in shown if seconds > 0)


def _status(metrics: Mapping[str, float], accuracy: float | None) -> Group:
    """The lower part of the live display: the numbers of the last row below their names, then the
    seconds of the phases, the reward of each function and the state of the engines.
    """
    cells = _columns(metrics)
    if accuracy is not None:
        cells.insert(1, ("accuracy", f"{accuracy:.1%}".replace("%", " %")))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name, _ in cells:
        table.add_column(name, no_wrap=False)
    table.add_row(*(text for _, text in cells))
    details = Table.grid(padding=(0, 2))
    for name, text in _details(metrics):
        details.add_row(Text(name, style="dim"), text)
    return Group(table, details)


def _details(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The lines below the numbers in the live display, as (name, text)."""
    lines = []
    if phases := _phases(metrics):
        lines.append((f"step {metrics.get('time/step_s', math.nan):.1f} s", phases))
    rewards = [
        f"{key.split('/')[1]} {value:.3f}"
        for key, value in metrics.items()
        if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean"
    ]
    if rewards:
        lines.append(("rewards", ", ".join(rewards)))
    formats = (
        ("cluster/restarts", "restarts {:.0f}"),
        ("policy/probe_gap", "gap to the learner {:.1e} nats"),
        ("policy/staleness_mean", "{:.1f} versions behind"),
        ("time/response_s_p95", "95 % of responses within {:.1f} s"),
        ("engine/rollout/running", "{:.0f} requests at once"),
        ("engine/rollout/prefix_hit_rate", "{:.0%} of prompts from the prefix cache"),
    )
    health = [form.format(metrics[key]) for key, form in formats if key in metrics]
    if health := [text.replace("%", " %").replace("  ", " ") for text in health]:
        lines.append(("engines", ", ".join(health)))
    return lines
