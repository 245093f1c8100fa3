"""Draws several diagrams as one picture, for report.png and the model card."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hybridrl.report.chart import FAINT, Chart, Curve, Drawing

INK = "#1f2430"
GRID = "#e5e7eb"
MARKERS = "osD^vP*X"


def draw_overview(charts: Sequence[Chart], title: str, subtitle: str) -> bytes:
    """All diagrams in one picture as PNG bytes, the first one twice as wide as the others.

    Without any diagram the picture has only its title and subtitle.
    """
    cells = max(len(charts) + (1 if len(charts) > 1 else 0), 1)
    columns = min(3, cells)
    lines = math.ceil(cells / columns)
    head = 0.95  # inches for title and subtitle
    height = 3.35 * lines + head
    layout = ConstrainedLayoutEngine(
        w_pad=0.16, h_pad=0.14, rect=(0.0, 0.0, 1.0, 1 - head / height)
    )
    figure = Figure(figsize=(5.6 * columns, height), layout=layout, facecolor="white")
    grid = figure.add_gridspec(lines, columns)
    cell = 0
    for chart in charts:
        span = 2 if cell == 0 and columns > 1 else 1
        axes = figure.add_subplot(grid[cell // columns, cell % columns : cell % columns + span])
        cell += span
        draw_chart(axes, chart)
        axes.set_title(chart.title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=9)
    inset = 0.16 / (5.6 * columns)
    figure.text(
        inset,
        1 - 0.2 / height,
        title,
        fontsize=19,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,  # a $ in the name of a directory does not begin a formula
    )
    figure.text(
        inset, 1 - 0.6 / height, subtitle, fontsize=12, color=FAINT, va="top", parse_math=False
    )
    return _png(figure, dpi=110)


def draw_chart(axes: Axes, chart: Chart) -> None:
    """Draw one diagram, without its title and caption."""
    drawing = chart.drawing
    _style_axes(axes, chart)
    for number, curve in enumerate(drawing.curves):
        _draw_curve(axes, curve, drawing, MARKERS[number % len(MARKERS)])
    bottom = np.zeros(len(drawing.bars[0].x)) if drawing.bars else np.zeros(0)
    for bars in drawing.bars:
        axes.bar(
            bars.x,
            bars.heights,
            width=bars.width,
            bottom=bottom,
            color=bars.colour,
            label=_shown(bars.label),
        )
        bottom = bottom + bars.heights
    for place, level in enumerate(drawing.levels):
        axes.axhline(level.value, color=level.colour, linewidth=1.8, linestyle=(0, (5, 3)))
        axes.annotate(
            level.label,
            (0.25 * (place % 4), level.value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 5),
            textcoords="offset points",
            color=level.colour,
            fontsize=11,
            fontweight="bold",
        )
    low, high = drawing.y_range()
    # Leave space for the legend of the bars, and for the values beside the points.
    axes.set_ylim(
        low - (0.15 * (high - low) if any(c.ends for c in drawing.curves) else 0.0),
        1.15 * high if drawing.bars else high,
    )
    _legend(axes, many=bool(drawing.bars))


def _draw_curve(axes: Axes, curve: Curve, drawing: Drawing, marker: str) -> None:
    if curve.low is not None and curve.high is not None:
        axes.fill_between(
            curve.x, curve.low, curve.high, color=curve.colour, alpha=0.15, linewidth=0
        )
    mean = curve.running_mean()
    if mean is not None:
        axes.plot(curve.x, curve.y, color=curve.colour, alpha=0.28, linewidth=1)
    axes.plot(
        curve.x,
        curve.y if mean is None else mean,
        color=curve.colour,
        linewidth=2,
        linestyle="--" if curve.dashed else "-",
        marker=marker if curve.marked or len(curve.y) == 1 else None,
        markersize=5,
        label=_shown(curve.label),
    )
    if curve.ends:
        for at, align in {0: "left", len(curve.x) - 1: "right"}.items():
            axes.annotate(
                drawing.unit.text(curve.y[at]),
                (curve.x[at], curve.y[at]),
                xytext=(0, -19),
                textcoords="offset points",
                color=curve.colour,
                fontsize=12,
                fontweight="bold",
                ha="left" if len(curve.x) == 1 else align,
            )


def _style_axes(axes: Axes, chart: Chart) -> None:
    """Set grid, ticks and the horizontal range."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    axes.set_xlabel(chart.x_label, fontsize=10, color=FAINT)
    axes.set_xlim(*chart.drawing.x_range())
    if chart.drawing.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    unit = chart.drawing.unit
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit.tick(value)))


def _shown(label: str) -> str:
    """The label with a space before a leading underscore, since matplotlib's legend omits labels
    that begin with one.
    """
    return f" {label}" if label.startswith("_") else label


def _legend(axes: Axes, *, many: bool) -> None:
    """Add a legend if there is more than one entry."""
    if len(axes.get_legend_handles_labels()[0]) < 2:
        return
    style = {"frameon": False, "fontsize": 10, "labelcolor": INK, "handlelength": 1.6}
    if many:
        axes.legend(ncols=4, loc="upper left", columnspacing=1.2, handleheight=0.8, **style)
    else:
        axes.legend(**style)


def _png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG bytes; its texts have no formulas and no control characters."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a $ in a name does not begin a formula
        text.set_text(printable(text.get_text()))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def printable(text: str) -> str:
    """The text with unprintable characters escaped, such as line breaks and control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
