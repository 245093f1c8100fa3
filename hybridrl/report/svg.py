"""Draws a diagram as SVG for the page, with the values that the page's script shows under the
pointer.

The SVG alone has axes, curves and labels; without the script only the values at each point are
missing.
"""

import json
import math
from dataclasses import replace
from html import escape

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from hybridrl.report.chart import Chart, Curve, Drawing, Float64, plain

WIDTH = 560
HEIGHT = 300
LEFT = 62
RIGHT = 14
TOP = 14
BOTTOM = 46
MOST_POINTS = 1000
"""Largest number of points of a curve on the page; points of longer curves are means of
neighbouring values.
"""


class Frame:
    """Converts values to coordinates of the SVG."""

    def __init__(self, drawing: Drawing) -> None:
        self.left, self.right = drawing.x_range()
        self.low, self.high = drawing.y_range()
        self.log = drawing.log

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def x_ticks(self) -> list[float]:
        locator = MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1)
        ticks = locator.tick_values(max(self.left, 0.0), self.right)
        return [float(tick) for tick in ticks if self.left <= tick <= self.right]

    def y_ticks(self) -> list[float]:
        locator = (
            LogLocator(subs=(1.0, 2.0, 5.0) if self.high < 100 * self.low else (1.0,), numticks=9)
            if self.log
            else MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
        )
        ticks = locator.tick_values(self.low, self.high)
        return [float(tick) for tick in ticks if self.low <= tick <= self.high]


def draw(chart: Chart) -> str:
    """The diagram as an SVG element, followed by a script element with its values as JSON.

    Labels are escaped, so they may be text of users.
    """
    drawing = shortened(chart.drawing)
    frame = Frame(drawing)
    parts = [_axes(chart, frame), _bars(drawing, frame), _levels(drawing, frame)]
    parts += [_band(curve, frame) for curve in drawing.curves]
    parts += [_curve(curve, frame) for curve in drawing.curves]
    parts += [_ends(curve, drawing, frame) for curve in drawing.curves if curve.ends]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(spoken(chart))}">{"".join(parts)}</svg>'
        f'<script type="application/json">{_values(drawing, frame, chart.x_label)}</script>'
    )


def spoken(chart: Chart) -> str:
    """A sentence that describes the diagram, for screen readers."""
    unit = chart.drawing.unit
    curves = [
        f"{curve.label} from {unit.text(curve.y[0])} to {unit.text(curve.y[-1])}"
        for curve in chart.drawing.curves
    ]
    levels = [level.label for level in chart.drawing.levels if level.label]
    bars = [bars.label for bars in chart.drawing.bars]
    return f"{chart.title} by {chart.x_label}: {'; '.join([*curves, *levels, *bars])}"


def shortened(drawing: Drawing) -> Drawing:
    """The drawing with at most MOST_POINTS values in each curve."""
    return replace(drawing, curves=tuple(_means(curve) for curve in drawing.curves))


def neighbours(drawing: Drawing) -> int:
    """The number of values whose mean is a point of the longest curve."""
    longest = max((len(curve.x) for curve in drawing.curves), default=0)
    return max(math.ceil(longest / MOST_POINTS), 1)


def _means(curve: Curve) -> Curve:
    size = math.ceil(len(curve.x) / MOST_POINTS)
    if size == 1:
        return curve

    def means(values: Float64) -> Float64:
        starts = np.arange(0, len(values), size)
        return np.add.reduceat(values, starts) / np.diff([*starts, len(values)])

    return replace(
        curve,
        x=means(curve.x),
        y=means(curve.y),
        low=None if curve.low is None else means(curve.low),
        high=None if curve.high is None else means(curve.high),
    )


def _axes(chart: Chart, frame: Frame) -> str:
    unit = chart.drawing.unit
    base = HEIGHT - BOTTOM
    parts = []
    for tick in frame.y_ticks():
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4.5}" text-anchor="end">{unit.tick(tick)}</text>'
        )
    parts.append(f'<path class="base" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for tick in frame.x_ticks():
        x = frame.x(tick)
        parts.append(
            f'<text x="{x}" y="{base + 18}" text-anchor="middle">{short_number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = escape(chart.x_label)
    parts.append(f'<text x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def short_number(value: float) -> str:
    """A number as short text. Example: 2500 is "2,500", 120000 is "120k", 3400000 is "3.4M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (letter != "k" and abs(value) >= size):
            return f"{value / size:,.4g}{letter}"
    return f"{value:,.6g}"


def _bars(drawing: Drawing, frame: Frame) -> str:
    parts = []
    below = np.zeros(len(drawing.bars[0].x)) if drawing.bars else np.zeros(0)
    for bars in drawing.bars:
        path = ""
        for x, start, height in zip(bars.x, below, bars.heights, strict=True):
            if height > 0:
                left = frame.x(x - bars.width / 2)
                right = frame.x(x + bars.width / 2)
                top = frame.y(start + height)
                path += f"M{left} {frame.y(start)}H{right}V{top}H{left}Z"
        parts.append(f'<path fill="{bars.colour}" d="{path}"/>')
        below = below + bars.heights
    return "".join(parts)


def _levels(drawing: Drawing, frame: Frame) -> str:
    parts = []
    for place, level in enumerate(drawing.levels):
        y = frame.y(level.value)
        x = LEFT + 6 + 0.25 * (place % 4) * (WIDTH - LEFT - RIGHT)
        parts.append(
            f'<path class="level" stroke="{level.colour}" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
            f'<text class="strong" x="{x:.0f}" y="{y - 6:.1f}" fill="{level.colour}">'
            f"{escape(level.label)}</text>"
        )
    return "".join(parts)


def _band(curve: Curve, frame: Frame) -> str:
    """The band around a curve, over the parts where its edges are finite."""
    if curve.low is None or curve.high is None:
        return ""
    known = np.isfinite(curve.low) & np.isfinite(curve.high)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], known.astype(int), [0]])))
    path = ""
    for start, end in edges.reshape(-1, 2):
        places = range(start, end)
        there = [f"{frame.x(curve.x[i])} {frame.y(curve.high[i])}" for i in places]
        back = [f"{frame.x(curve.x[i])} {frame.y(curve.low[i])}" for i in reversed(places)]
        path += f"M{'L'.join([*there, *back])}Z"
    return f'<path class="band" fill="{curve.colour}" d="{path}"/>'


def _curve(curve: Curve, frame: Frame) -> str:
    mean = curve.running_mean()
    parts = []
    if mean is not None:
        parts.append(_line(curve.x, curve.y, frame, f'class="pale" stroke="{curve.colour}"'))
    kind = "curve dashed" if curve.dashed else "curve"
    shown = curve.y if mean is None else mean
    parts.append(_line(curve.x, shown, frame, f'class="{kind}" stroke="{curve.colour}"'))
    if curve.marked or len(curve.x) == 1:
        parts += [
            f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="4" fill="{curve.colour}"/>'
            for x, y in zip(curve.x, curve.y, strict=True)
        ]
    return "".join(parts)


def _line(x: Float64, y: Float64, frame: Frame, attributes: str) -> str:
    points = "L".join(f"{frame.x(a)} {frame.y(b)}" for a, b in zip(x, y, strict=True))
    return f'<path {attributes} d="M{points}"/>'


def _ends(curve: Curve, drawing: Drawing, frame: Frame) -> str:
    """The first and the last value as text, below their points or, near the axis, above them."""
    parts = []
    last = len(curve.x) - 1
    for at, anchor in {0: "start", last: "start" if last == 0 else "end"}.items():
        y = frame.y(curve.y[at])
        below = y + 22 if y < HEIGHT - BOTTOM - 28 else y - 10
        parts.append(
            f'<text class="strong" x="{frame.x(curve.x[at])}" y="{below:.1f}" '
            f'text-anchor="{anchor}" fill="{curve.colour}">{drawing.unit.text(curve.y[at])}</text>'
        )
    return "".join(parts)


def _values(drawing: Drawing, frame: Frame, x_label: str) -> str:
    """The values that the script shows under the pointer, as JSON without any "<"."""
    lines = [(c.label, c.colour, c.x, c.y, c.low, c.high) for c in drawing.curves]
    lines += [(b.label, b.colour, b.x, b.heights, None, None) for b in drawing.bars]
    values = {
        "frame": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "x": [plain(frame.left), plain(frame.right)],
        "y": [plain(frame.low), plain(frame.high)],
        "log": frame.log,
        "unit": drawing.unit.value,
        "stacked": bool(drawing.bars),
        "x_label": x_label,
        "curves": [
            {
                "label": label,
                "colour": colour,
                "x": [plain(v) for v in x],
                "y": [plain(v) for v in y],
            }
            | (
                {"low": [_known(v) for v in low], "high": [_known(v) for v in high]}
                if low is not None and high is not None
                else {}
            )
            for label, colour, x, y, low, high in lines
        ],
    }
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _known(value: float) -> float | None:
    return plain(value) if math.isfinite(value) else None
