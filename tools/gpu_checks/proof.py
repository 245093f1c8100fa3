"""The results of all steps and the machine on which they ran, stored as proof.json."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_checks.check import Check, Verdict

SCHEMA = 1
FILE = "proof.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    name: str
    title: str
    seconds: float
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    number: int
    title: str
    made: str  # the time at which the step ended, in ISO 8601
    parts: tuple[PartResult, ...]

    @property
    def checks(self) -> list[Check]:
        return [check for part in self.parts for check in part.checks]

    def count(self, verdict: Verdict) -> int:
        return sum(check.verdict is verdict for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    device: str  # cuda or cpu
    machine: dict[str, Any]  # the description of gpu_checks.devices
    steps: tuple[StepResult, ...]  # in the order of their numbers

    @property
    def checks(self) -> list[Check]:
        return [check for step in self.steps for check in step.checks]

    @property
    def failed(self) -> bool:
        return any(check.verdict is Verdict.failed for check in self.checks)

    def with_step(self, step: StepResult) -> "Proof":
        """A copy with this step, which replaces an earlier step of the same number."""
        others = [other for other in self.steps if other.number != step.number]
        steps = tuple(sorted([*others, step], key=lambda step: step.number))
        return Proof(device=self.device, machine=self.machine, steps=steps)


def store(proof: Proof, folder: Path) -> None:
    text = json.dumps({"schema": SCHEMA, **asdict(proof)}, indent=1, allow_nan=False)
    (folder / FILE).write_text(text + "\n")


def earlier_steps(folder: Path, device: str, machine: dict[str, Any]) -> Iterator[StepResult]:
    """The stored steps of an earlier call, if its device and machine, software included, are
    equal.
    """
    path = folder / FILE
    if not path.is_file():
        return
    stored = json.loads(path.read_text())
    if stored.get("schema") != SCHEMA or stored["device"] != device:
        return
    if stored["machine"] != machine:
        return
    for step in stored["steps"]:
        parts = tuple(PartResult(**part | {"checks": checks_of(part)}) for part in step["parts"])
        yield StepResult(**step | {"parts": parts})


def checks_of(part: dict[str, Any]) -> tuple[Check, ...]:
    values: Sequence[dict[str, Any]] = part["checks"]
    return tuple(Check(**value | {"verdict": Verdict(value["verdict"])}) for value in values)
