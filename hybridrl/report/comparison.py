"""`hybridrl report A B ...`: several runs compared on one page and one picture, both in A."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from hybridrl.core.errors import DataError
from hybridrl.core.files import replace_bytes, replace_text
from hybridrl.report.figures import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    PERCENT,
    PLAIN,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    Rows,
    draw_overview,
    draw_panel,
    series,
    teacher_levels,
)
from hybridrl.report.html import render_comparison
from hybridrl.report.saved_config import read_config
from hybridrl.tracking.console import duration
from hybridrl.tracking.jsonl import read_metrics

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#7f7f7f", "#8c6d31")
MARKERS = "osD^vP*X"
LAST_STEPS = 10
"""The final number of a metric that every step measures is its mean over this many last steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One of the runs to compare."""

    name: str  # unique among these runs
    rows: Rows  # of metrics.jsonl, in step order, at least one
    settings: dict[str, str]  # of config.yaml, by dotted key


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A metric by which runs are compared."""

    key: str
    title: str
    caption: str
    share: bool = False  # shown in per cent
    marked: bool = False  # measured at evaluations, not at every step; drawn with markers

    def text(self, value: float) -> str:
        """Example: 0.2993 as a share is "29.9 %", otherwise "0.2993"."""
        return f"{100 * value:.1f} %" if self.share else f"{value:,.4g}"


METRICS = (
    Compared(
        key="eval/accuracy",
        title="Held-out accuracy",
        caption="Share of problems never trained on that are solved. Dashed: the teacher, where "
        "all runs have the same.",
        share=True,
        marked=True,
    ),
    Compared(
        key="eval/loss",
        title="Held-out loss",
        caption="Loss on the held-out data's own responses.",
        marked=True,
    ),
    Compared(
        key="eval/pair_accuracy",
        title="Held-out pairs ranked right",
        caption="Share of held-out pairs whose chosen response scores above the rejected one.",
        share=True,
        marked=True,
    ),
    Compared(
        key="reward/mean",
        title="Training reward",
        caption="Mean reward of the responses sampled in each step.",
    ),
    Compared(
        key="kl/token",
        title="Distance to the teacher",
        caption="Divergence of the student from its teachers, in nats per response token.",
    ),
    Compared(
        key="rollout/length_mean",
        title="Response length",
        caption="Mean tokens of a response.",
    ),
)


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Write comparison.html and comparison.png into the first directory; returns the page's path.

    Raises:
        DataError: a directory holds no metrics, or one of its files is damaged.
        RunDirectoryError: a file that is read is a link or a special file.
        OSError: a file cannot be read or written.
    """
    runs = load_runs(run_dirs)
    panels = [panel for metric in METRICS if (panel := panel_of(metric, runs)) is not None]
    longest = max((run.rows for run in runs), key=lambda rows: rows[-1]["train/step"])
    names = [run.name for run in runs]
    page = render_comparison(
        names=names,
        curves=[(panel, draw_panel(panel, longest)) for panel in panels],
        numbers=final_numbers(runs),
        settings=differing_settings(runs),
    )
    picture = draw_overview(panels, longest, "Comparison", "  \N{MIDDLE DOT}  ".join(names))
    replace_bytes(run_dirs[0] / "comparison.png", picture)
    path = run_dirs[0] / "comparison.html"
    replace_text(path, page)
    return path


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs in the given order, each named by the shortest unique end of its path.

    Raises:
        DataError: a directory holds no metrics, or is given twice.
    """
    runs = []
    for directory, name in zip(run_dirs, short_names(run_dirs), strict=True):
        rows = sorted(read_metrics(directory), key=lambda row: row["train/step"])
        if not rows:
            raise DataError(
                f"{directory}: no metrics, nothing to compare; give the run.dir of a run that did "
                "a step"
            )
        config, _ = read_config(directory)
        runs.append(Run(name=name, rows=rows, settings=flat(config)))
    return runs


def short_names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has.

    Example: exp1/run, exp2/run and exp1/other are named "exp1/run", "exp2/run" and "other".

    Raises:
        DataError: a directory is given twice.
    """
    paths = [directory.resolve() for directory in run_dirs]
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise DataError(
            f"{repeated}: is given twice, and a run cannot be compared with itself; name each run "
            "once"
        )
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            name = path.parts[-length:]
            if sum(other.parts[-length:] == name for other in paths) == 1:
                break
        names.append("/".join(name))
    return names


def flat(tree: Any, key: str = "") -> dict[str, str]:
    """The values of nested mappings as text, by dotted key."""
    if not isinstance(tree, dict):
        return {key: str(tree)}
    values: dict[str, str] = {}
    for name, part in tree.items():
        values |= flat(part, f"{key}.{name}" if key else str(name))
    return values


def panel_of(metric: Compared, runs: Sequence[Run]) -> Panel | None:
    """A panel with one curve for each run that has the metric; None: no run has it."""
    curves = {run.name: series(run.rows, metric.key) for run in runs}
    if not any(values.size for _, values in curves.values()):
        return None
    last = max(float(steps[-1]) for steps, _ in curves.values() if steps.size)
    levels = [level for run in runs for level in teacher_levels(run.rows).values()]

    def draw(axes: Axes, rows: Rows) -> None:
        styles = zip(COLOURS * len(runs), MARKERS * len(runs), strict=True)
        for (name, (steps, values)), (colour, marker) in zip(curves.items(), styles, strict=False):
            if values.size:
                has_marker = metric.marked or values.size == 1
                # Matplotlib's legend omits labels that begin with an underscore.
                shown = f" {name}" if name.startswith("_") else name
                ends = f"{metric.text(values[0])} to {metric.text(values[-1])}"
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    marker=marker if has_marker else None,
                    markersize=5,
                    linewidth=2 if metric.marked else 1.4,
                    label=f"{shown}  {ends}" if metric.marked else shown,
                )
        same_teacher = levels and math.isclose(min(levels), max(levels))
        if metric.key == "eval/accuracy" and same_teacher:
            label = f"teacher  {metric.text(levels[0])}"
            axes.axhline(levels[0], color=FAINT, linewidth=1.5, linestyle=(0, (5, 3)), label=label)
        axes.set_xlim(-0.5, last + 0.5)
        axes.yaxis.set_major_formatter(PERCENT if metric.share else PLAIN)
        axes.legend(fontsize=8, frameon=False, loc="best")

    return Panel(title=metric.title, caption=metric.caption, needs=(metric.key,), draw=draw)


def final_numbers(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the table of numbers: a name, then a cell per run; omits what no run measured."""
    table = [["steps", *(f"{int(run.rows[-1]['train/step'])}" for run in runs)]]
    for metric in METRICS:
        cells = [_final(run.rows, metric) for run in runs]
        what = "first to last" if metric.marked else f"mean of the last {LAST_STEPS} steps"
        if any(cells):
            table.append([f"{metric.title} ({metric.key}), {what}", *cells])
    times = [series(run.rows, "time/step_s")[1] for run in runs]
    if any(values.size for values in times):
        cells = [duration(float(values.sum())) if values.size else "" for values in times]
        table.append(["wall time of the steps", *cells])
    return table


def _final(rows: Rows, metric: Compared) -> str:
    """The cell of a metric in the table of numbers; empty: the run did not measure it."""
    values = series(rows, metric.key)[1]
    if not values.size:
        return ""
    if metric.marked:
        return f"{metric.text(values[0])} to {metric.text(values[-1])}"
    return metric.text(float(values[-LAST_STEPS:].mean()))


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the table of settings, without run.dir: the key, then each run's value or "-"."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run.dir")
    table = [[key, *(run.settings.get(key, "-") for run in runs)] for key in keys]
    return [row for row in table if len(set(row[1:])) > 1]
