"""Differences between two arms, paired by seed: both arms of a seed have the same problems."""

from collections.abc import Sequence

from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Runs


def values(runs: Runs, arm: str, number: str) -> Sequence[float]:
    """One for each seed."""
    return [run.numbers[number] for run in runs[arm]]


def per_seed(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The differences of values of the same seeds."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Of the mean difference of values of the same seeds."""
    return estimate(per_seed(ours, theirs))


def difference(runs: Runs, one: str, other: str, number: str) -> Estimate:
    """Of `one` minus `other`."""
    return paired(values(runs, one, number), values(runs, other, number))


def points(of: Estimate) -> str:
    """Of a share, in percentage points. Example: "1.2 [0.3, 2.1] points"."""
    return f"{of.text(100, 1)} points"
