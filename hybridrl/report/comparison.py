"""`hybridrl report A B ...`: compares several runs on one page and one picture, both in A."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from hybridrl.core.errors import DataError
from hybridrl.core.files import replace_bytes, replace_text
from hybridrl.report.chart import (
    FAINT,
    PALETTE,
    Chart,
    Curve,
    Drawing,
    Float64,
    Level,
    Rows,
    Unit,
    series,
)
from hybridrl.report.figures import metrics_of_sets, teacher_levels
from hybridrl.report.html import View, render_comparison
from hybridrl.report.picture import draw_overview
from hybridrl.report.saved_config import read_config
from hybridrl.report.svg import short_number
from hybridrl.tracking.console import duration
from hybridrl.tracking.jsonl import read_metrics

LAST_STEPS = 10
"""For a metric of every step, the final number is the mean over this many last steps."""
PLACES = ("run.dir", "run.seed")
"""Runs that differ only in these settings are one method with several seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One of the runs that are compared."""

    name: str  # unique among these runs
    rows: Rows  # of metrics.jsonl, in step order, at least one
    settings: dict[str, str]  # of config.yaml, by dotted key


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ only in their seed, or a single run."""

    name: str
    colour: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A horizontal axis: the cost at which the runs are compared."""

    name: str  # in the switch of the page
    label: str  # of the horizontal axis
    metric: str | None  # a metric of each step that is summed over the steps; None: the step itself

    def places(self, rows: Rows) -> Float64 | None:
        """[n] the position of each row on the axis; None: the run did not measure the metric.

        Example: train/tokens of 100 and 50 at steps 1 and 2: [100, 150], and 0 for step 0.
        """
        if self.metric is None:
            return np.array([row["train/step"] for row in rows], dtype=np.float64)
        amounts = np.array([row.get(self.metric, math.nan) for row in rows], dtype=np.float64)
        return np.nan_to_num(amounts).cumsum() if np.isfinite(amounts).any() else None

    def budget(self, place: float) -> str:
        """A position in words, e.g. "at step 200"."""
        match self.name:
            case "tokens":
                return f"at {short_number(place)} tokens"
            case "seconds":
                return f"after {duration(place)} of steps"
        return f"at step {place:.0f}"


AXES = (
    Axis(name="steps", label="optimizer step", metric=None),
    Axis(name="tokens", label="response tokens trained on", metric="train/tokens"),
    Axis(name="seconds", label="seconds of the steps", metric="time/step_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A metric by which runs are compared."""

    key: str
    title: str
    caption: str
    unit: Unit = Unit.plain
    marked: bool = False  # measured at evaluations, not at every step; drawn with markers


METRICS = (
    Compared(
        key="eval/accuracy",
        title="Held-out accuracy",
        caption="Share of problems never trained on that are solved. Dashed: the teacher of "
        "the runs that have one, if its accuracy is the same in all of them.",
        unit=Unit.share,
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
        unit=Unit.share,
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
        DataError: a directory has no metrics or is given twice, or one of its files is damaged.
        RunDirectoryError: a file that is read is a link or a special file.
        OSError: a file cannot be read or written.
    """
    groups = group_runs(load_runs(run_dirs))
    metrics = [*METRICS, *metrics_by_set(groups)]
    views = [
        View(name=axis.name, charts=charts)
        for axis in AXES
        if (charts := [c for m in metrics if (c := chart_of(m, groups, axis)) is not None])
    ]
    names = [group.name for group in groups]
    page = render_comparison(
        names=names,
        views=views,
        seeds=max(len(group.runs) for group in groups),
        numbers=final_numbers(groups, metrics),
        budgets=equal_budgets(groups, metrics),
        settings=differing_settings(groups),
    )
    charts = views[0].charts if views else []
    picture = draw_overview(charts, "Comparison", "  \N{MIDDLE DOT}  ".join(names))
    replace_bytes(run_dirs[0] / "comparison.png", picture)
    path = run_dirs[0] / "comparison.html"
    replace_text(path, page)
    return path


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs in the given order, each named by the shortest unique end of its path.

    Raises:
        DataError: a directory has no metrics, or is given twice.
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


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups that differ only in their seed, in the order of their first runs.

    A run without saved settings is a group of its own, since its method is not known.
    """
    members: dict[object, list[Run]] = {}
    for run in runs:
        rest = frozenset((k, v) for k, v in run.settings.items() if k not in PLACES)
        members.setdefault(rest if run.settings else run.name, []).append(run)
    of_runs = [[run.name for run in of_group] for of_group in members.values()]
    names = [group_name(of) for of in of_runs]
    names = [
        name if names.count(name) == 1 else " + ".join(of)
        for name, of in zip(names, of_runs, strict=True)
    ]
    groups = zip(names, members.values(), cycle(PALETTE), strict=False)
    return [
        Group(name=name, colour=colour, runs=tuple(of_group)) for name, of_group, colour in groups
    ]


def group_name(names: Sequence[str]) -> str:
    """The name of a group of runs with these names.

    Example: "a-* (2 seeds)" for "a-1" and "a-2"; a single run keeps its name.
    """
    if len(names) == 1:
        return names[0]
    common = ""
    for letters in zip(*names, strict=False):
        if len(set(letters)) > 1:
            break
        common += letters[0]
    return f"{common}* ({len(names)} seeds)" if common else " + ".join(names)


def metrics_by_set(groups: Sequence[Group]) -> list[Compared]:
    """The accuracy on each named held-out set of any run."""
    rows = [row for group in groups for run in group.runs for row in run.rows]
    return [
        Compared(
            key=key,
            title=f"Accuracy on {name}",
            caption="Mean value of the first reward function on the problems of this set.",
            unit=Unit.share,
            marked=True,
        )
        for name, key in metrics_of_sets(rows, "accuracy").items()
    ]


def chart_of(metric: Compared, groups: Sequence[Group], axis: Axis) -> Chart | None:
    """A diagram with one curve for each group that has the metric; None: no group has it."""
    found = [curve for group in groups if (curve := mean_curve(group, metric, axis)) is not None]
    if not found:
        return None
    levels = [
        level for g in groups for run in g.runs for level in teacher_levels(run.rows).values()
    ]
    same_teacher = bool(levels) and math.isclose(min(levels), max(levels))
    shown: tuple[Level, ...] = ()
    if metric.key == "eval/accuracy" and same_teacher:
        label = f"teacher {metric.unit.text(levels[0])}"
        shown = (Level(label=label, value=levels[0], colour=FAINT),)
    absent = [g.name for g in groups if g.name not in {curve.label for curve in found}]
    caption = f"{metric.caption} Not measured: {', '.join(absent)}." if absent else metric.caption
    return Chart(
        title=metric.title,
        caption=caption,
        metrics=(metric.key,),
        drawing=Drawing(curves=tuple(found), levels=shown, unit=metric.unit),
        x_label=axis.label,
    )


def mean_curve(group: Group, metric: Compared, axis: Axis) -> Curve | None:
    """The mean of a metric over the runs of a group at each step at which all of them measured it,
    with a band from the lowest to the highest value; None: there is no such step.
    """
    by_step = []
    for run in group.runs:
        places = axis.places(run.rows)
        if places is None:
            return None
        by_step.append(
            {
                row["train/step"]: (place, row[metric.key])
                for row, place in zip(run.rows, places, strict=True)
                if math.isfinite(row.get(metric.key, math.nan))
            }
        )
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        return None
    points = np.array([[of_run[step] for step in steps] for of_run in by_step], dtype=np.float64)
    values = points[:, :, 1]  # [runs, steps]
    several = len(group.runs) > 1
    return Curve(
        label=group.name,
        colour=group.colour,
        x=points[:, :, 0].mean(axis=0),
        y=values.mean(axis=0),
        low=values.min(axis=0) if several else None,
        high=values.max(axis=0) if several else None,
        marked=metric.marked,
        smooth=not metric.marked,
    )


def final_numbers(groups: Sequence[Group], metrics: Sequence[Compared]) -> list[list[str]]:
    """Rows of the table of numbers: a name, then a cell for each group. Metrics that no run
    measured are omitted.
    """

    def steps(run: Run) -> float:
        return run.rows[-1]["train/step"]

    table = [["steps", *(_spread([steps(r) for r in g.runs], "{:.0f}".format) for g in groups)]]
    for metric in metrics:
        cells = [_final(group, metric) for group in groups]
        what = "first to last" if metric.marked else f"mean of the last {LAST_STEPS} steps"
        if any(cells):
            table.append([f"{metric.title} ({metric.key}), {what}", *cells])
    times = [[series(run.rows, "time/step_s")[1] for run in g.runs] for g in groups]
    if any(values.size for of_group in times for values in of_group):
        totals = [[float(v.sum()) for v in of_group if v.size] for of_group in times]
        table.append(["wall time of the steps", *(_spread(t, duration) for t in totals)])
    return table


def _spread(values: Sequence[float], text: Any) -> str:
    """The values of several runs as text: mean, lowest and highest, or the only value."""
    if not values:
        return ""
    mean = text(sum(values) / len(values))
    low, high = text(min(values)), text(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def _final(group: Group, metric: Compared) -> str:
    """The cell of a metric in the table of numbers; empty: no run of the group measured it."""
    measured = [v for run in group.runs if (v := series(run.rows, metric.key)[1]).size]
    if not measured:
        return ""
    text = metric.unit.text
    if metric.marked:
        first = text(sum(float(v[0]) for v in measured) / len(measured))
        return f"{first} to {_spread([float(v[-1]) for v in measured], text)}"
    return _spread([float(v[-LAST_STEPS:].mean()) for v in measured], text)


def equal_budgets(groups: Sequence[Group], metrics: Sequence[Compared]) -> list[list[str]]:
    """Rows of the table at equal steps, tokens and seconds: the metric and the largest amount that
    every group with the metric has reached, then the metric's value there in each group. Metrics of
    fewer than two groups are omitted.
    """
    table = []
    for metric in metrics:
        for axis in AXES:
            curves = [mean_curve(group, metric, axis) for group in groups]
            found = [curve for curve in curves if curve is not None]
            if len(found) < 2:
                continue
            budget = min(float(curve.x[-1]) for curve in found)
            cells = ["" if c is None else _at(c, budget, metric) for c in curves]
            table.append([f"{metric.title} {axis.budget(budget)}", *cells])
    return table


def _at(curve: Curve, place: float, metric: Compared) -> str:
    """The value of a curve at a position as text. A metric of evaluations is interpolated linearly
    between them; for a metric of every step it is the mean over the last steps up to there.
    """

    def value(of: Float64) -> float:
        if metric.marked:
            return float(np.interp(place, curve.x, of))
        reached = of[curve.x <= place] if (curve.x <= place).any() else of[:1]
        return float(reached[-LAST_STEPS:].mean())

    text = metric.unit.text
    if curve.low is None or curve.high is None:
        return text(value(curve.y))
    return f"{text(value(curve.y))} ({text(value(curve.low))} to {text(value(curve.high))})"


def differing_settings(groups: Sequence[Group]) -> list[list[str]]:
    """Rows of the table of settings that differ between groups, without run.dir: the key, then
    each group's values, "-" for a missing one.
    """
    keys = dict.fromkeys(
        key for g in groups for run in g.runs for key in run.settings if key != "run.dir"
    )
    table = []
    for key in keys:
        values = [dict.fromkeys(run.settings.get(key, "-") for run in g.runs) for g in groups]
        table.append([key, *(", ".join(of_group) for of_group in values)])
    return [row for row in table if len(set(row[1:])) > 1]
