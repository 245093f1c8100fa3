"""A diagram as plain values, from which the picture and the page are drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
FAINT = "#6b7280"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#7f7f7f", "#8c6d31")


class Unit(StrEnum):
    """The unit of a diagram's values, by which they are written."""

    plain = "plain"  # 0.2993 as "0.2993"
    share = "share"  # 0.2993 as "29.9 %"
    seconds = "seconds"  # 2.5 as "2.5 s"

    def text(self, value: float) -> str:
        """A value as a person reads it, e.g. in a legend."""
        match self:
            case Unit.share:
                return f"{100 * value:.1f} %"
            case Unit.seconds:
                return f"{value:,.3g} s"
        return f"{value:,.4g}"

    def tick(self, value: float) -> str:
        """A value as a label of an axis, e.g. "30 %"."""
        match self:
            case Unit.share:
                return f"{100 * value:.3g} %"
            case Unit.seconds:
                return f"{value:g} s"
        return f"{value:,.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values of one kind over the horizontal axis; at least one value."""

    label: str
    colour: str
    x: Float64  # [n] ascending
    y: Float64  # [n] finite
    low: Float64 | None = None  # [n] lower edge of the band around the values, NaN: none there
    high: Float64 | None = None  # [n] upper edge
    marked: bool = False  # measured at evaluations only, so each point has a marker
    dashed: bool = False
    smooth: bool = False  # the values are drawn pale, and their running mean over them
    ends: bool = False  # the first and the last value are written beside their points

    def running_mean(self) -> Float64 | None:
        """[n] the mean of each value and its neighbours; None if none is to be drawn."""
        neighbours = len(self.y) // 40
        return running_mean(self.y, neighbours) if self.smooth and neighbours else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A value that does not depend on the horizontal axis, drawn as a dashed line."""

    label: str  # empty: no label
    value: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One layer of stacked bars, on top of the layers before it."""

    label: str
    colour: str
    x: Float64  # [n] centres
    heights: Float64  # [n]
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The content of a diagram, without its texts."""

    curves: tuple[Curve, ...] = ()
    levels: tuple[Level, ...] = ()
    bars: tuple[Bars, ...] = ()
    unit: Unit = Unit.plain
    include: tuple[float, ...] = ()  # values that the vertical axis must contain
    log: bool = False  # logarithmic vertical axis
    roof: float = math.inf  # upper limit of the vertical axis, unless a value is higher

    def is_empty(self, *, hide_zero: bool) -> bool:
        """Whether there are no values or, with hide_zero, only zeros."""
        values = [*(curve.y for curve in self.curves), *(bars.heights for bars in self.bars)]
        return not any(v.any() if hide_zero else v.size for v in values)

    def x_range(self) -> tuple[float, float]:
        """The ends of the horizontal axis, with space beside the first and the last value."""
        points = [*(curve.x for curve in self.curves), *(bars.x for bars in self.bars)]
        last = max((float(x[-1]) for x in points if x.size), default=0.0)
        room = max(0.5, 0.015 * last)
        return -room, last + room

    def y_range(self) -> tuple[float, float]:
        """The ends of the vertical axis."""
        values = [part for c in self.curves for part in (c.y, c.low, c.high) if part is not None]
        if self.bars:
            stack = np.sum([bars.heights for bars in self.bars], axis=0)
            return 0.0, 1.08 * float(stack.max()) or 1.0
        levels = np.array([*(level.value for level in self.levels), *self.include])
        known = np.concatenate([*values, levels])
        known = known[np.isfinite(known)]
        if self.log:
            known = known[known > 0]
            low, high = float(known.min()), float(known.max())
            if high / low < 12:
                low, high = low / 3, high * 3
            return low / 1.1, high * 1.1
        low, high = float(known.min()), float(known.max())
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = low if low in self.include else low - room
        return bottom, min(high + room, max(self.roof, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A diagram with its texts."""

    title: str
    caption: str
    metrics: tuple[str, ...]  # some or all of the metrics that it shows; the page explains these
    drawing: Drawing
    x_label: str = "optimizer step"


def series(rows: Rows, key: str) -> tuple[Float64, Float64]:
    """Steps [n] and finite values [n] of a metric, both float64, in the order of the rows."""
    measured = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    steps = np.array([row["train/step"] for row in measured], dtype=np.float64)
    values = np.array([row[key] for row in measured], dtype=np.float64)
    return steps, values


def running_mean(values: Float64, neighbours: int) -> Float64:
    """[n] the mean of each value and its `neighbours` on either side, or fewer at the ends.

    Example: ([0, 2, 7], 1) -> [1, 3, 4.5].
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(np.arange(len(values)) - neighbours, 0)
    end = np.minimum(np.arange(len(values)) + neighbours + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def plain(value: Any) -> Any:
    """A number rounded to five digits, for JSON and SVG."""
    return float(f"{float(value):.5g}")
