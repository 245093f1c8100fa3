"""The curves of the report: each panel is drawn by itself for the page, and all in one picture."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from hybridrl.tracking.console import PHASES, TEACHER

Rows = Sequence[dict[str, float]]
Float64 = NDArray[np.float64]

# Okabe and Ito's palette, which can be distinguished with every kind of colour vision.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
INK = "#1f2430"
FAINT = "#6b7280"
GRID = "#e5e7eb"
TEACHER_COLOURS = (VERMILION, PURPLE, ORANGE, GREEN)
PHASE_COLOURS = dict(
    zip(PHASES, (BLUE, SKY, ORANGE, GREEN, PURPLE, VERMILION, YELLOW), strict=True)
)
MAX_BARS = 50  # of the panel of phases; longer runs have several steps in one bar
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
PLAIN = FuncFormatter(lambda value, _: f"{value:,.6g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram of the report."""

    title: str
    caption: str
    needs: tuple[str, ...]  # metrics; without a finite value of any of them it is omitted
    draw: Callable[[Axes, Rows], None]
    hide_zero: bool = False  # also omit it if all values are 0


def series(rows: Rows, key: str) -> tuple[Float64, Float64]:
    """Steps [n] and finite values [n] of a metric, both float64, in the order of the rows."""
    measured = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    steps = np.array([row["train/step"] for row in measured], dtype=np.float64)
    values = np.array([row[key] for row in measured], dtype=np.float64)
    return steps, values


def teacher_levels(rows: Rows) -> dict[str, float]:
    """The held-out accuracy of each teacher, by its name."""
    return {
        k.removeprefix(TEACHER): v
        for row in rows
        for k, v in row.items()
        if k.startswith(TEACHER) and math.isfinite(v)
    }


def panels_of(rows: Rows) -> list[Panel]:
    """The panels for which this run has numbers."""

    def has_numbers(panel: Panel) -> bool:
        columns = [series(rows, key)[1] for key in panel.needs]
        return any(column.any() if panel.hide_zero else column.size for column in columns)

    return [panel for panel in PANELS if has_numbers(panel)]


def draw_panel(panel: Panel, rows: Rows) -> bytes:
    """One panel as PNG bytes, without title and caption; the rows must be in step order."""
    figure = Figure(figsize=(6.4, 3.3), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _style_axes(axes, rows[-1]["train/step"])
    panel.draw(axes, rows)
    return _png(figure, dpi=160)


def draw_overview(panels: Sequence[Panel], rows: Rows, title: str, subtitle: str) -> bytes:
    """All panels in one picture as PNG bytes, the first one twice as wide as the others.

    Without any panel the picture has only its title and subtitle.
    """
    cells = max(len(panels) + (1 if len(panels) > 1 else 0), 1)
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
    for panel in panels:
        span = 2 if cell == 0 and columns > 1 else 1
        axes = figure.add_subplot(grid[cell // columns, cell % columns : cell % columns + span])
        cell += span
        _style_axes(axes, rows[-1]["train/step"])
        panel.draw(axes, rows)
        axes.set_title(panel.title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=9)
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


def _png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG bytes, its texts without mathematics and control characters."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a $ in a name does not begin a formula
        text.set_text(printable(text.get_text()))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def printable(text: str) -> str:
    """The text with line breaks and characters that no font has (e.g. control ones) escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _style_axes(axes: Axes, last_step: float) -> None:
    """Set grid, ticks and the horizontal range, which all panels have in common."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    axes.set_xlabel("optimizer step", fontsize=10, color=FAINT)
    room = max(0.5, 0.015 * last_step)
    axes.set_xlim(-room, last_step + room)


def _line(
    axes: Axes,
    rows: Rows,
    key: str,
    colour: str,
    label: str = "",
    *,
    smooth: bool = False,
    style: str = "-",
) -> None:
    """Draw a metric over steps; a single value is drawn as a dot.

    Args:
        smooth: draw a running mean over a pale line of the raw values.
    """
    steps, values = series(rows, key)
    if not values.size:  # an empty line would still get an entry in the legend
        return
    marker = "o" if len(values) == 1 else None
    neighbours = len(values) // 40
    if smooth and neighbours > 0:
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=1)
        values = _running_mean(values, neighbours)
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=2,
        linestyle=style,
        marker=marker,
        label=label or None,
    )


def _running_mean(values: Float64, neighbours: int) -> Float64:
    """[n] -> [n]: mean of each value and its `neighbours` on either side, fewer at the ends.

    Example: ([0, 2, 7], 1) -> [1, 3, 4.5].
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(np.arange(len(values)) - neighbours, 0)
    end = np.minimum(np.arange(len(values)) + neighbours + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def _from_zero(axes: Axes) -> None:
    """Include 0 in the axis, so that heights are proportional, and leave room above the curve."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.0), high + 0.12 * abs(high))


def _legend(axes: Axes, **place: Any) -> None:
    """Add a legend if there is more than one curve."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, handlelength=1.6, **place)


def _accuracy(axes: Axes, rows: Rows) -> None:
    steps, values = series(rows, "eval/accuracy")
    error_of = {row["train/step"]: row.get("eval/accuracy_stderr", math.nan) for row in rows}
    errors = np.nan_to_num(np.array([error_of[s] for s in steps]))
    axes.fill_between(steps, values - errors, values + errors, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(steps, values, color=BLUE, linewidth=2.4, marker="o", markersize=5, label="student")
    levels = teacher_levels(rows)
    for place, ((name, level), colour) in enumerate(
        zip(levels.items(), TEACHER_COLOURS * len(levels), strict=False)
    ):
        axes.axhline(level, color=colour, linewidth=1.8, linestyle=(0, (5, 3)))
        label = (
            f"teacher {100 * level:.1f} %"
            if len(levels) == 1
            else f"teacher {name} {100 * level:.1f} %"
        )
        axes.annotate(
            label,
            (0.25 * (place % 4), level),
            xycoords=("axes fraction", "data"),
            xytext=(4, 5),
            textcoords="offset points",
            color=colour,
            fontsize=11,
            fontweight="bold",
        )
    for step, value in {steps[0]: values[0], steps[-1]: values[-1]}.items():
        axes.annotate(
            f"{100 * value:.1f} %",
            (step, value),
            xytext=(0, -19),
            textcoords="offset points",
            color=BLUE,
            fontsize=12,
            fontweight="bold",
            ha="left" if step == steps[0] else "right",
        )
    axes.yaxis.set_major_formatter(PERCENT)
    top = max([*values, *levels.values()])
    low = min([*values, *levels.values()])
    room = max(0.2 * (top - low), 0.03)
    axes.set_ylim(max(low - 1.3 * room, -0.02), min(top + room, 1.04))


def _reward(axes: Axes, rows: Rows) -> None:
    banded = [
        row
        for row in rows
        if math.isfinite(row.get("reward/stderr", math.nan))
        and math.isfinite(row.get("reward/mean", math.nan))
    ]
    steps, mean = series(banded, "reward/mean")
    _, error = series(banded, "reward/stderr")
    axes.fill_between(steps, mean - error, mean + error, color=BLUE, alpha=0.14, linewidth=0)
    _line(axes, rows, "reward/mean", BLUE, "sum", smooth=True)
    parts = sorted(
        {
            key
            for row in rows
            for key in row
            if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean"
        }
    )
    if len(parts) > 1:
        for key, colour in zip(
            parts, (ORANGE, GREEN, PURPLE, SKY, VERMILION) * len(parts), strict=False
        ):
            _line(
                axes,
                rows,
                key,
                colour,
                key.removeprefix("reward/").removesuffix("/mean"),
                smooth=True,
            )
    _legend(axes)


def _schedules(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "schedule/lambda", VERMILION, "reward weight (lambda)")
    _line(axes, rows, "schedule/imitation", BLUE, "imitation weight", style="--")
    _from_zero(axes)
    _legend(axes)


def _gradients(axes: Axes, rows: Rows) -> None:
    drawn = [
        row
        for row in rows
        if row.get("grad/dense_norm", 0) > 0 or row.get("grad/sparse_norm", 0) > 0
    ]
    for key, colour, label in (
        ("grad/dense_norm", BLUE, "dense (imitation)"),
        ("grad/sparse_norm", VERMILION, f"sparse ({_sparse_part(rows)})"),
    ):
        positive = [row for row in drawn if row.get(key, 0) > 0]
        _line(axes, positive, key, colour, label, smooth=True)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high / low < 12:
        axes.set_ylim(low / 3, high * 3)
    _legend(axes)


def _sparse_part(rows: Rows) -> str:
    """The source of the sparse part of the gradient in this run."""
    if series(rows, "pair/loss")[1].size:
        return "ranked pairs"
    parts = []
    if series(rows, "schedule/lambda")[1].any():
        parts.append("reward")
    if series(rows, "nll/token")[1].size:
        parts.append("likelihood of the data")
    return " and ".join(parts) or "returns"


def _loss(axes: Axes, rows: Rows) -> None:
    for key, label in (("pair/loss", "training pairs"), ("nll/token", "training data")):
        if series(rows, key)[1].size:
            _line(axes, rows, key, BLUE, label, smooth=True)
            break
    _evaluations(axes, rows, "eval/loss", "held-out data")
    axes.yaxis.set_major_formatter(PLAIN)
    _legend(axes)


def _pair_accuracy(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "pair/accuracy", BLUE, "training pairs", smooth=True)
    _evaluations(axes, rows, "eval/pair_accuracy", "held-out pairs")
    axes.axhline(0.5, color=FAINT, linewidth=1, linestyle=(0, (2, 3)))
    axes.yaxis.set_major_formatter(PERCENT)
    _legend(axes)


def _pair_scores(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "pair/chosen_score", GREEN, "chosen", smooth=True)
    _line(axes, rows, "pair/rejected_score", VERMILION, "rejected", smooth=True)
    axes.yaxis.set_major_formatter(PLAIN)
    _legend(axes)


def _evaluations(axes: Axes, rows: Rows, key: str, label: str) -> None:
    """Draw a metric that is measured at evaluations, each value with a marker."""
    steps, values = series(rows, key)
    if values.size:
        axes.plot(
            steps, values, color=VERMILION, linewidth=1.8, marker="o", markersize=5, label=label
        )


def _phases(axes: Axes, rows: Rows) -> None:
    timed = [row for row in rows if row["train/step"] > 0]
    size = math.ceil(len(timed) / MAX_BARS)
    groups = [timed[i : i + size] for i in range(0, len(timed), size)]
    centres = np.array([np.mean([row["train/step"] for row in group]) for group in groups])
    bottom = np.zeros(len(groups))
    for name in PHASES:
        key = f"time/{name}_s"
        heights = np.array(
            [np.mean([np.nan_to_num(row.get(key, 0.0)) for row in group]) for group in groups]
        )
        if heights.any():
            axes.bar(
                centres,
                heights,
                width=0.82 * size,
                bottom=bottom,
                color=PHASE_COLOURS[name],
                label=name,
            )
            bottom += heights
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.set_ylim(0, 1.3 * bottom.max() or 1.0)  # 1.0: no row has the time of a phase
    _legend(axes, ncols=4, loc="upper left", columnspacing=1.2, handleheight=0.8)


def _lengths(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "rollout/length_mean", BLUE, "mean", smooth=True)
    _line(axes, rows, "rollout/length_p95", ORANGE, "95th percentile", smooth=True)
    _from_zero(axes)
    _legend(axes)


def _failures(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "rollout/truncated_frac", BLUE, "response cut off", smooth=True)
    if series(rows, "reward/error_rate")[1].any():
        _line(axes, rows, "reward/error_rate", VERMILION, "reward call failed")
    axes.yaxis.set_major_formatter(PERCENT)
    _from_zero(axes)
    _legend(axes)


def _importance(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "policy/rho_mean", BLUE, "mean importance ratio")
    _line(axes, rows, "policy/ess", GREEN, "effective sample share", style="--")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.95), max(high, 1.05))
    axes.yaxis.set_major_formatter(PLAIN)
    _legend(axes)


def _single(key: str, colour: str) -> Callable[[Axes, Rows], None]:
    def draw(axes: Axes, rows: Rows) -> None:
        _line(axes, rows, key, colour, smooth=True)
        _from_zero(axes)
        axes.yaxis.set_major_formatter(PLAIN)

    return draw


PANELS = (
    Panel(
        title="Held-out accuracy",
        caption="Share of problems never trained on that are solved (band: one standard error). "
        "Dashed: the teacher's own level.",
        needs=("eval/accuracy",),
        draw=_accuracy,
    ),
    Panel(
        title="Loss on given responses",
        caption="Negative log-likelihood of the data's responses per token, or the loss of its "
        "ranked pairs. Held-out rows are never trained on.",
        needs=("pair/loss", "nll/token", "eval/loss"),
        draw=_loss,
    ),
    Panel(
        title="Pairs ranked right",
        caption="Share of pairs whose chosen response scores above the rejected one; a coin "
        "reaches 50 %.",
        needs=("pair/accuracy", "eval/pair_accuracy"),
        draw=_pair_accuracy,
    ),
    Panel(
        title="Scores of both responses",
        caption="Mean score that the loss compares: log-ratio to the reference, log-likelihood, "
        "or the reward model's value.",
        needs=("pair/chosen_score", "pair/rejected_score"),
        draw=_pair_scores,
    ),
    Panel(
        title="Training reward",
        caption="Mean reward of the responses sampled in each step (band: one standard error; "
        "thick: running mean).",
        needs=("reward/mean",),
        draw=_reward,
    ),
    Panel(
        title="Distance to the teacher",
        caption="KL divergence of the student from its teacher, in nats per response token; 0 "
        "would be a perfect copy.",
        needs=("kl/token",),
        draw=_single("kl/token", GREEN),
    ),
    Panel(
        title="Weights of the two goals",
        caption="How strongly each step weighs earning reward (lambda) and imitating the teacher.",
        needs=("schedule/lambda", "schedule/imitation"),
        draw=_schedules,
        hide_zero=True,
    ),
    Panel(
        title="Gradient by its parts",
        caption="Norm of the logit gradient: the dense part compares the whole vocabulary with a "
        "teacher at every token, the sparse part weighs the tokens that were written. Log "
        "scale.",
        needs=("grad/dense_norm", "grad/sparse_norm"),
        draw=_gradients,
        hide_zero=True,
    ),
    Panel(
        title="Where the time goes",
        caption="Wall seconds per step by phase; in long runs each bar averages neighbouring "
        "steps.",
        needs=("time/step_s",),  # rows of steps have it, the evaluation before training has not
        draw=_phases,
        hide_zero=True,
    ),
    Panel(
        title="Response length",
        caption="Tokens per sampled response.",
        needs=("rollout/length_mean", "rollout/length_p95"),
        draw=_lengths,
    ),
    Panel(
        title="Cut-off responses",
        caption="Share of responses that hit the length limit, and of reward calls that failed.",
        needs=("rollout/truncated_frac", "reward/error_rate"),
        draw=_failures,
        hide_zero=True,
    ),
    Panel(
        title="Entropy",
        caption="How undecided the student is at each token, in nats; near 0 it always writes the "
        "same.",
        needs=("entropy/token",),
        draw=_single("entropy/token", PURPLE),
    ),
    Panel(
        title="Sampler against learner",
        caption="Learner's over sampler's probability of the sampled tokens, and the share of "
        "samples that effectively count; 1 is ideal.",
        needs=("policy/rho_mean", "policy/ess"),
        draw=_importance,
    ),
    Panel(
        title="Age of the data",
        caption="How many weight updates old the trained tokens are, on average.",
        needs=("policy/staleness_mean",),
        draw=_single("policy/staleness_mean", ORANGE),
        hide_zero=True,
    ),
    Panel(
        title="Throughput",
        caption="Tokens processed per second of wall time.",
        needs=("perf/tokens_per_s",),
        draw=_single("perf/tokens_per_s", SKY),
    ),
)
