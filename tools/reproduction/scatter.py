"""Arms as points of two numbers: the seeds small and pale, their mean with one standard error."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from reproduction.estimate import Estimate, estimate


def draw_arm(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    *,
    colour: str,
    marker: str = "o",
    label: str | None = None,
) -> tuple[Estimate, Estimate]:
    """Returns both means.

    Args:
        x, y: a number of each seed.
        label: in the legend; None: the arm is not in it.
    """
    means = estimate(x), estimate(y)
    axes.scatter(x, y, s=8, color=colour, alpha=0.4)
    axes.errorbar(
        means[0].mean,
        means[1].mean,
        xerr=means[0].error,
        yerr=means[1].error,
        fmt=marker,
        color=colour,
        capsize=3,
        label=label,
    )
    return means
