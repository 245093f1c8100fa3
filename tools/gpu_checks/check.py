"""One check: what was measured, what was expected and why, and the verdict."""

import math
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    passed = "pass"
    failed = "fail"
    not_run = "not run"
    figure = "figure"  # a number without an expected value


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check, as it is stored in proof.json."""

    name: str
    verdict: Verdict
    value: float | None = None  # None: nothing was measured, or it is not finite
    low: float | None = None  # the smallest value that passes; None: no limit
    high: float | None = None  # the largest value that passes; None: no limit
    unit: str = ""
    # why these limits were chosen; if the check was not run: what is missing; if it broke off: the
    # error
    reason: str = ""


def within(
    name: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    reason: str,
) -> Check:
    """A check that passes if low <= value <= high, and fails if the value is not finite."""
    if not math.isfinite(value):
        return failed(name, f"the value is {value}; {reason}")
    passes = (low is None or value >= low) and (high is None or value <= high)
    return Check(
        name=name,
        verdict=Verdict.passed if passes else Verdict.failed,
        value=value,
        low=low,
        high=high,
        unit=unit,
        reason=reason,
    )


def holds(name: str, condition: bool, reason: str) -> Check:
    """A check that passes if a condition is true."""
    return Check(name=name, verdict=Verdict.passed if condition else Verdict.failed, reason=reason)


def figure(name: str, value: float, unit: str, reason: str = "") -> Check:
    """A check without an expected value; it fails if the value is not finite."""
    if not math.isfinite(value):
        return failed(name, f"the value is {value}")
    return Check(name=name, verdict=Verdict.figure, value=value, unit=unit, reason=reason)


def failed(name: str, reason: str) -> Check:
    return Check(name=name, verdict=Verdict.failed, reason=reason)


def not_run(name: str, reason: str) -> Check:
    return Check(name=name, verdict=Verdict.not_run, reason=reason)
