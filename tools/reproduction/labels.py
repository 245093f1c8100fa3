"""Labels beside points of a picture, none of which covers another label or a point."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

SIZE = 9.0  # of the letters
DISTANCES = tuple(range(9, 90, 9))  # from the point to the middle of the nearest edge
ANGLES = (45, -45, 135, -135, 20, -20, 160, -160)  # degrees; beside error bars, not on them
NEAR = 9  # a label that is farther away has a line to its point
RADIUS = 7.0  # of what is kept free around a point
"""All lengths are in typographic points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle in the picture, by its middle."""

    x: float
    y: float
    half_width: float
    half_height: float

    def covers(self, other: "Box") -> bool:
        """Whether they have a common part."""
        return (
            abs(self.x - other.x) < self.half_width + other.half_width
            and abs(self.y - other.y) < self.half_height + other.half_height
        )


def draw_labels(axes: Axes, labels: Mapping[str, tuple[float, float]]) -> None:
    """Write each label beside its point; call it last, for the axes' limits are fixed then.

    Args:
        labels: of x and y in the units of the axes. Where no place is free, the last one is taken.
    """
    figure = axes.get_figure()
    assert figure is not None, "the axes are part of a figure"
    place = axes.get_position()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = (72 * inches for inches in figure.get_size_inches())
    at = {
        label: (
            place.width * width * (x - left) / (right - left),
            place.height * height * (y - bottom) / (top - bottom),
        )
        for label, (x, y) in labels.items()
    }
    taken = [Box(x=x, y=y, half_width=RADIUS, half_height=RADIUS) for x, y in at.values()]
    for label, (x, y) in at.items():
        possible = list(places(label, x, y))
        free = [place for place in possible if not any(map(place[1].covers, taken))]
        distance, box = free[0] if free else possible[-1]
        taken.append(box)
        axes.annotate(
            label,
            labels[label],
            (box.x - x, box.y - y),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SIZE,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            if distance > NEAR
            else None,
        )


def places(label: str, x: float, y: float) -> Iterator[tuple[float, Box]]:
    """Where the label of a point may stand, the best first, and the distance of each."""
    half_width = 0.31 * SIZE * len(label)  # of an average letter
    half_height = 0.6 * SIZE
    for distance, angle in itertools.product(DISTANCES, ANGLES):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        yield (
            distance,
            Box(
                x=x + across * (distance + half_width),
                y=y + up * (distance + half_height),
                half_width=half_width,
                half_height=half_height,
            ),
        )
