"""The effect of a fault on a run, stored in results/findings.json and shown in results/CARD.md."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hybridrl.settings.run import DeadlineConfig

RESULTS = Path(__file__).parent / "results"
FINDINGS = RESULTS / "findings.json"
CARD = RESULTS / "CARD.md"
UP = "../../../"
"""The path from results/ to the root of the repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one fault. A value is None if it does not apply to the fault."""

    passed: bool
    outcome: str  # one line: what was done and observed
    detected_s: float | None = None  # from the fault to the first line of output that reports it
    # from the fault to the first step after it, or until an engine serves again
    recovered_s: float | None = None
    lost_steps: int | None = None  # steps done twice
    # prompts that this run did not use (train on or pass over), but the run without a fault did
    lost_uids: int | None = None
    duplicated_uids: int | None = None  # prompts used more often than in the run without a fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the card."""

    id: str
    fault: str
    proof: str  # a file of the repository
    seconds: float  # duration of the scenario, including its other faults
    finding: Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The machine, the commit and the duration of the call that made some rows."""

    machine: str
    commit: str
    # the time that the tool took for all faults; None: it ran some of them, or has not finished yet
    whole_minutes: float | None = None


def store(rows: Iterable[Row], order: list[str], made: Made) -> list[dict[str, Any]]:
    """Add rows to the stored ones, replacing those with the same id, and rewrite the card.

    Args:
        order: the ids of all faults in the order of the card.

    Returns:
        all stored rows.
    """
    RESULTS.mkdir(exist_ok=True)
    stored = json.loads(FINDINGS.read_text()) if FINDINGS.is_file() else {}
    stored |= {row.id: asdict(row) | asdict(made) for row in rows}
    ordered = {key: stored[key] for key in order if key in stored}
    FINDINGS.write_text(json.dumps(ordered, indent=1) + "\n")
    missing = [key for key in order if key not in stored]
    CARD.write_text(card(list(ordered.values()), missing))
    return list(ordered.values())


def card(rows: list[dict[str, Any]], missing: list[str]) -> str:
    """The text of CARD.md."""
    passed = sum(row["finding"]["passed"] for row in rows)
    machines = sorted({row["machine"] for row in rows})
    lines = [
        "# Reliability card",
        "",
        f"Made by `tools/chaos` on {'; '.join(machines)}. {passed} of {len(rows)} rows pass"
        + (f"; not run: {', '.join(missing)}." if missing else ".")
        + f" {provenance(rows)} {summary(rows)}",
        "",
        "Detected: time from the fault to the first line that reports it. Recovered: time to the "
        "first step after it, or until an engine serves again.",
        "The longest wait for a worker that does not answer, by the default deadlines: "
        f"{DeadlineConfig().longest_silence_s:g} s.",
        "",
        "Lost: steps done twice. Prompts: lost / trained on twice, by the ledger compared with "
        "that of a run without a fault.",
        "",
        "| | fault | detected | recovered | lost | prompts | verdict | what was done and seen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def provenance(rows: list[dict[str, Any]]) -> str:
    """A sentence about the commits at which the rows were made; "unknown" for very old rows."""
    (commit, most), *others = Counter(row.get("commit", "unknown") for row in rows).most_common()
    if others:
        text = ", ".join(f"{count} at {other}" for other, count in others)
        return f"{most} were run at commit {commit}, {len(rows) - most} at other commits ({text})."
    runs = {row.get("whole_minutes") for row in rows}
    whole = next(iter(runs)) if len(runs) == 1 else None
    return f"All at commit {commit} in " + (
        "several runs." if whole is None else f"one run of {whole:.0f} min."
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """A sentence with the median and the maximum of the times."""
    clauses = []
    for name in ("detected", "recovered"):
        times = [
            row["finding"][f"{name}_s"] for row in rows if row["finding"][f"{name}_s"] is not None
        ]
        if times:
            clauses.append(
                f"{name} in {seconds(median(times))} (median), {seconds(max(times))} (most) over "
                f"{len(times)} faults"
            )
    return ("; ".join(clauses) + ".").capitalize() if clauses else ""


def line(row: dict[str, Any]) -> str:
    """A row of the card's table."""
    finding = row["finding"]
    prompts = f"{finding['lost_uids']} / {finding['duplicated_uids']}"
    shown = [
        f"[{row['id']}]({UP}{row['proof']})",
        row["fault"],
        seconds(finding["detected_s"]),
        seconds(finding["recovered_s"]),
        "-" if finding["lost_steps"] is None else str(finding["lost_steps"]),
        "-" if finding["lost_uids"] is None else prompts,
        "pass" if finding["passed"] else "**FAIL**",
        finding["outcome"],
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in shown)} |"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
