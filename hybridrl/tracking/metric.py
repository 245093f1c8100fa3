"""The entries of the glossary: metrics, and sections of metrics that belong together."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The entry of one key of metrics.jsonl, or of all keys of one form, in which <name> stands for
    any text without a slash.
    """

    key: str
    formula: str
    reading: str  # a healthy value, or what a change means
    unit: str = ""  # empty: a plain number

    @property
    def pattern(self) -> str:
        """A regular expression for its keys, e.g. reward/[^/]+/mean for reward/<name>/mean."""
        return "[^/]+".join(map(re.escape, re.split(r"<\w+>", self.key)))

    def covers(self, key: str) -> bool:
        """Whether this is the entry of a key. Example: reward/<name>/mean covers
        reward/countdown/mean.
        """
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
