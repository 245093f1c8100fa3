"""What the glossary says of one metric, and of metrics that belong together."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One key of metrics.jsonl, or all keys of one form: <name> matches anything but a slash."""

    key: str
    formula: str
    reading: str  # a healthy value, or what a change means
    unit: str = ""  # empty: a plain number

    @property
    def pattern(self) -> str:
        """A regular expression of its keys. Example: reward/[^/]+/mean of reward/<name>/mean."""
        return "[^/]+".join(map(re.escape, re.split(r"<\w+>", self.key)))

    def covers(self, key: str) -> bool:
        """Example: the metric reward/<name>/mean covers reward/countdown/mean."""
        return re.fullmatch(self.pattern, key) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Metrics that belong together, with a sentence about all of them."""

    title: str
    text: str
    metrics: tuple[Metric, ...]


def section(title: str, text: str, *rows: tuple[str, ...]) -> Section:
    """A section; each row is (key, unit, formula, reading)."""
    metrics = (
        Metric(key=key, unit=unit, formula=formula, reading=reading)
        for key, unit, formula, reading in rows
    )
    return Section(title=title, text=text, metrics=tuple(metrics))
