"""Learning curves: the seeds as thin lines, their mean with a band of one standard error."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from reproduction.estimate import estimate
from reproduction.experiment import Runs

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#999999",
)


def draw_curves(axes: Axes, runs: Runs, *, steps: Sequence[int]) -> None:
    """The greedy accuracy, accuracy_N of the numbers, of every arm after each of `steps`."""
    for colour, (name, of) in zip(COLOURS, runs.items(), strict=False):
        curves = [[100 * run.numbers[f"accuracy_{step}"] for step in steps] for run in of]
        for curve in curves:
            axes.plot(steps, curve, color=colour, linewidth=0.4, alpha=0.4)
        draw_mean(axes, steps, curves, colour=colour, label=name)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("step")
    axes.set_ylabel("greedy accuracy on held-out problems, per cent")


def draw_mean(
    axes: Axes,
    x: Sequence[float],
    curves: Sequence[Sequence[float]],
    *,
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    """The mean of curves at the same x, one of each seed, and its band."""
    found = [estimate(values) for values in zip(*curves, strict=True)]
    axes.plot(x, [at.mean for at in found], style, color=colour, label=label)
    axes.fill_between(
        x,
        [at.mean - at.error for at in found],
        [at.mean + at.error for at in found],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
