"""What a fault did to a run, kept in results/findings.json and shown in results/CARD.md."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from hybridrl.settings.run import DeadlineConfig

RESULTS = Path(__file__).parent / "results"
FINDINGS, CARD = RESULTS / "findings.json", RESULTS / "CARD.md"
UP = "../../../"
"""From results/ to the root of the repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """None stands for what the fault has not: a run that ends on purpose recovers in no time, a
    refused setting loses no step.
    """

    passed: bool
    said: str  # one line: what was done and seen
    detected_s: float | None = None  # from the fault to the first word of it
    recovered_s: float | None = (
        None  # from the fault to the first step after it, or to an engine that serves again
    )
    lost_steps: int | None = None  # steps done twice
    lost_uids: int | None = (
        None  # prompts that the run without a fault trained on and this one did not
    )
    duplicated_uids: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finding with its line of the matrix."""

    id: str
    fault: str
    proof: str  # file of the repository
    seconds: float  # that the scenario took, with those that share its run
    finding: Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What rows were made on."""

    machine: str
    commit: str
    whole_minutes: float | None = (
        None  # of the run of the tool that did every fault; None: it did some, or is not through
    )


def keep(rows: Iterable[Row], order: list[str], made: Made) -> list[dict]:
    """Add rows to those on file, each in the place of an older one of its id, and write the card
    anew; all that are now on file.
    """
    RESULTS.mkdir(exist_ok=True)
    found = json.loads(FINDINGS.read_text()) if FINDINGS.is_file() else {}
    found |= {row.id: asdict(row) | asdict(made) for row in rows}
    ordered = {key: found[key] for key in order if key in found}
    FINDINGS.write_text(json.dumps(ordered, indent=1) + "\n")
    missing = [key for key in order if key not in found]
    CARD.write_text(card(list(ordered.values()), missing))
    return list(ordered.values())


def card(rows: list[dict], missing: list[str]) -> str:
    passed = sum(row["finding"]["passed"] for row in rows)
    machines = sorted({row["machine"] for row in rows})
    lines = [
        "# Reliability card",
        "",
        f"Made by `tools/chaos` on {'; '.join(machines)}. {passed} of {len(rows)} rows pass"
        + (f"; not run: {', '.join(missing)}." if missing else ".")
        + f" {provenance(rows)} {summary(rows)}",
        "",
        "Detected: from the fault to the first word of it. Recovered: to the first step after it, "
        "or for an engine until it serves again.",
        "The longest silent wait for a worker, by the default deadlines: "
        f"{DeadlineConfig().longest_silence_s:g} s.",
        "",
        "Lost: steps done twice. Prompts: lost / trained on twice, by the ledger against that of "
        "a run without a fault.",
        "",
        "| | fault | detected | recovered | lost | prompts | verdict | what was done and seen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def provenance(rows: list[dict]) -> str:
    """At which commit, and in how many runs of the tool; unknown: the row is older than this
    entry.
    """
    (commit, most), *others = Counter(row.get("commit", "unknown") for row in rows).most_common()
    if others:
        told = ", ".join(f"{count} at {other}" for other, count in others)
        return f"{most} were run at commit {commit}, {len(rows) - most} at other commits ({told})."
    runs = {row.get("whole_minutes") for row in rows}
    whole = next(iter(runs)) if len(runs) == 1 else None
    return f"All at commit {commit} in " + (
        "several runs." if whole is None else f"one run of {whole:.0f} min."
    )


def summary(rows: list[dict]) -> str:
    """Median and maximum of the times over the faults that have them."""
    told = []
    for name in ("detected", "recovered"):
        times = [
            row["finding"][f"{name}_s"] for row in rows if row["finding"][f"{name}_s"] is not None
        ]
        if times:
            told.append(
                f"{name} in {seconds(median(times))} (median), {seconds(max(times))} (most) over "
                f"{len(times)} faults"
            )
    return ("; ".join(told) + ".").capitalize() if told else ""


def line(row: dict) -> str:
    found = row["finding"]
    shown = [*cells(row), "pass" if found["passed"] else "**FAIL**", found["said"]]
    return f"| {' | '.join(cell.replace('|', '/') for cell in shown)} |"


def cells(row: dict) -> list[str]:
    found = row["finding"]
    pair = (
        "-" if found["lost_uids"] is None else f"{found['lost_uids']} / {found['duplicated_uids']}"
    )
    lost = "-" if found["lost_steps"] is None else str(found["lost_steps"])
    return [
        f"[{row['id']}]({UP}{row['proof']})",
        row["fault"],
        seconds(found["detected_s"]),
        seconds(found["recovered_s"]),
        lost,
        pair,
    ]


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
