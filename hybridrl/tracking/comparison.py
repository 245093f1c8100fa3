"""One panel that puts several runs side by side by what they were trained for: held-out accuracy."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from hybridrl.errors import DataError
from hybridrl.tracking.figures import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    PERCENT,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    Rows,
    series,
    teacher_levels,
)
from hybridrl.tracking.jsonl import read_metrics

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#7f7f7f", "#8c6d31")
MARKERS = "osD^vP*X"


def comparison_panel(run_dirs: Sequence[Path]) -> Panel:
    """A panel with one line per run, named by its directory.

    Raises:
        DataError: a directory holds no metrics.
    """
    runs = {directory.resolve().name: read_metrics(directory) for directory in run_dirs}
    for name, rows in runs.items():
        if not rows:
            raise DataError(
                f"{name}: no metrics, nothing to compare; give the run.dir of a run that did a step"
            )

    def draw(axes: Axes, rows: Rows) -> None:
        last = 0.0
        for (name, own), colour, marker in zip(
            runs.items(), COLOURS * len(runs), MARKERS * len(runs), strict=False
        ):
            steps, values = series(sorted(own, key=lambda row: row["train/step"]), "eval/accuracy")
            if len(steps):
                label = f"{name}  {100 * values[0]:.1f} to {100 * values[-1]:.1f} %"
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=2,
                    label=label,
                )
                last = max(last, float(steps[-1]))
        levels = [level for own in runs.values() for level in teacher_levels(own).values()]
        if levels and math.isclose(min(levels), max(levels)):
            axes.axhline(
                levels[0],
                color=FAINT,
                linewidth=1.5,
                linestyle=(0, (5, 3)),
                label=f"teacher  {100 * levels[0]:.1f} %",
            )
        axes.set_xlim(-0.5, last + 0.5)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return Panel(
        title="Compared with other runs",
        caption="Held-out accuracy of each run, named by its directory, with its first and its last value.",
        needs=("train/step",),
        draw=draw,
    )
