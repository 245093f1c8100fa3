"""A mean over seeds with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)
"""The 97.5 % quantile of Student's t distribution with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of the mean of a quantity that is normally distributed over seeds."""

    mean: float
    error: float  # the standard error of the mean; 0 for a number that has no randomness
    half: float  # half of the width of the 95 % interval

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """Example: "0.312 [0.290, 0.334]"; without brackets where nothing is random."""
        mean, low, high = (f"{scale * x:.{digits}f}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.half else mean


def estimate(values: Sequence[float]) -> Estimate:
    """Of values of different seeds; a single value is taken as exact.

    Example: [1, 2, 3] has the mean 2, the error 1/sqrt(3) = 0.577 and the interval 2 +- 2.484.

    Raises:
        ValueError: there are no values, or more than 21.
    """
    if not 1 <= len(values) <= len(T_95) + 1:
        raise ValueError(f"{len(values)} values: must be from 1 to {len(T_95) + 1}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean=mean, error=0.0, half=0.0)
    freedom = len(values) - 1
    variance = math.fsum((value - mean) ** 2 for value in values) / freedom
    error = math.sqrt(variance / len(values))
    return Estimate(mean=mean, error=error, half=T_95[freedom - 1] * error)
