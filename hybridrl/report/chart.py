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
    """How the values of a diagram are written."""

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
        """A value at an axis, e.g. "30 %"."""
        match self:
            case Unit.share:
                return f"{100 * value:.3g} %"
            case Unit.seconds:
                return f"{value:g} s"
        return f"{value:,.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values of one kind over the horizontal axis, at least one."""

    label: str
    colour: str
    x: Float64  # [n] ascending
    y: Float64  # [n] finite
    low: Float64 | None = None  # [n] the band around the values, NaN where it has none
    high: Float64 | None = None  # [n]
    marked: bool = False  # measured at evaluations, not at every step
    dashed: bool = False
    smooth: bool = False  # a running mean is drawn over the pale values
    ends: bool = False  # the first and the last value are written beside their points

    def running_mean(self) -> Float64 | None:
        """[n] the mean of each value and its neighbours; None: it is not drawn."""
        neighbours = len(self.y) // 40
        return running_mean(self.y, neighbours) if self.smooth and neighbours else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A value that does not depend on the horizontal axis: a dashed line."""

    label: str  # empty: it has none
    value: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Heights of one kind, on top of those that come before it."""

    label: str
    colour: str
    x: Float64  # [n] centres
    heights: Float64  # [n]
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What a diagram shows."""

    curves: tuple[Curve, ...] = ()
    levels: tuple[Level, ...] = ()
    bars: tuple[Bars, ...] = ()
    unit: Unit = Unit.plain
    include: tuple[float, ...] = ()  # values that the vertical axis reaches at least
    log: bool = False  # logarithmic vertical axis
    roof: float = math.inf  # the vertical axis ends here at the latest

    def is_empty(self, *, hide_zero: bool) -> bool:
        """Whether nothing was measured, or (hide_zero) only zeros."""
        values = [*(curve.y for curve in self.curves), *(bars.heights for bars in self.bars)]
        return not any(v.any() if hide_zero else v.size for v in values)

    def x_range(self) -> tuple[float, float]:
        """The ends of the horizontal axis, with room beside the first and the last value."""
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
    """A diagram with its words."""

    title: str
    caption: str
    metrics: tuple[str, ...]  # that it shows, or some of them; the page explains these
    drawing: Drawing
    x_label: str = "optimizer step"


def series(rows: Rows, key: str) -> tuple[Float64, Float64]:
    """Steps [n] and finite values [n] of a metric, both float64, in the order of the rows."""
    measured = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    steps = np.array([row["train/step"] for row in measured], dtype=np.float64)
    values = np.array([row[key] for row in measured], dtype=np.float64)
    return steps, values


def running_mean(values: Float64, neighbours: int) -> Float64:
    """[n] -> [n]: mean of each value and its `neighbours` on either side, fewer at the ends.

    Example: ([0, 2, 7], 1) -> [1, 3, 4.5].
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(np.arange(len(values)) - neighbours, 0)
    end = np.minimum(np.arange(len(values)) + neighbours + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def plain(value: Any) -> Any:
    """A number as JSON and SVG hold it, of five digits."""
    return float(f"{float(value):.5g}")
