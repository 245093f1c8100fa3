"""The checked-in report: each function that depends on the device, and those of its lines that no
test executes, each with the reason.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from gpu_coverage.lines import DeviceFunction

PATH = Path(__file__).parent / "report.json"
WHOLE = "*"
"""The key in `not_executed` that stands for all lines of a function."""

Functions = dict[str, list[DeviceFunction]]


@dataclass
class Entry:
    """What the report says about a function."""

    digest: str  # the digest of its lines when they were recorded
    lines: int  # the number of its lines
    not_executed: dict[str, str] = field(default_factory=dict)  # reasons, by the line or WHOLE


Report = dict[str, dict[str, Entry]]
"""Entries by the path of the file, and then by the name of the function."""


def load(path: Path = PATH) -> Report:
    content = json.loads(path.read_text()) if path.exists() else {}
    return {
        file: {name: Entry(**entry) for name, entry in functions.items()}
        for file, functions in content.items()
    }


def save(report: Report, path: Path = PATH) -> None:
    content = {
        file: {
            name: {"digest": entry.digest, "lines": entry.lines}
            | ({"not_executed": entry.not_executed} if entry.not_executed else {})
            for name, entry in functions.items()
        }
        for file, functions in report.items()
    }
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def problems(functions: Functions, report: Report) -> list[str]:
    """The differences between report and source, one sentence each; empty: every line that counts
    is executed or has a reason.
    """
    found = []
    for file, own in functions.items():
        recorded = report.get(file, {})
        for function in own:
            entry = recorded.get(function.name)
            if entry is None or entry.digest != function.digest:
                found.append(f"{file}: {function.name} is new or was changed")
                continue
            for line, reason in entry.not_executed.items():
                if not reason:
                    found.append(f"{file}: {function.name}: no test executes {line!r}")
    names = {(file, function.name) for file, own in functions.items() for function in own}
    recorded_names = {(file, name) for file, own in report.items() for name in own}
    found += [
        f"{file}: {name} depends on no device any more" for file, name in recorded_names - names
    ]
    return sorted(found)


def updated(functions: Functions, report: Report, executed: set[str]) -> Report:
    """The report after a run of tests.

    A line of an unchanged function that an earlier run executed remains executed. A line that no
    run executed keeps its reason, if it has one.

    Args:
        functions: the present functions of the product.
        report: the report before the run.
        executed: the names of the lines that the run executed, as in lines.instrumented.
    """
    made: Report = {}
    for file, own in functions.items():
        for function in own:
            before = report.get(file, {}).get(function.name)
            reasons = before.not_executed if before else {}
            unchanged = before is not None and before.digest == function.digest
            missing = [
                line
                for line in function.lines
                if f"{file}\t{function.name}\t{line}" not in executed
                and not (unchanged and line not in reasons and WHOLE not in reasons)
            ]
            if WHOLE in reasons and missing:
                left = {WHOLE: reasons[WHOLE]}
            else:
                left = {line: reasons.get(line, "") for line in missing}
            made.setdefault(file, {})[function.name] = Entry(
                function.digest, len(function.lines), left
            )
    return made
