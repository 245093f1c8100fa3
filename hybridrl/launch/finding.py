"""One result of `hybridrl doctor`."""

from dataclasses import dataclass
from enum import StrEnum

from hybridrl.core import redact


class Level(StrEnum):
    """How bad a finding is."""

    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check, which is printed as one line."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{f'[{self.level}]':<6} {self.name}: {redact.text(self.text)}"


def ok(name: str, text: str) -> Finding:
    return Finding(level=Level.ok, name=name, text=text)


def warn(name: str, text: str) -> Finding:
    return Finding(level=Level.warn, name=name, text=text)


def fail(name: str, text: str) -> Finding:
    return Finding(level=Level.fail, name=name, text=text)
