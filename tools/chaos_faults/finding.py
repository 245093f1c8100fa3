"""What a fault did to a run, kept in results/findings.json and shown in results/CARD.md."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hybridrl.config import DeadlineConfig

RESULTS = Path(__file__).parent / "results"
FINDINGS, CARD = RESULTS / "findings.json", RESULTS / "CARD.md"
UP = "../../../"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """None stands for what the fault has not: a run that ends on purpose recovers in no time, a refused setting loses no step."""

    passed: bool
    said: str  # one line: what was done and seen
    detected_s: float | None = None  # from the fault to the first word of it
    recovered_s: float | None = None  # from the fault to the first step after it, or to an engine that serves again
    lost_steps: int | None = None  # steps done twice
    lost_uids: int | None = None  # prompts that the run without a fault trained on and this one did not
    duplicated_uids: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finding with its line of the matrix."""

    id: str
    fault: str
    proof: str  # file of the repository
    seconds: float  # that the scenario took, with those that share its run
    finding: Finding


def keep(rows: Iterable[Row], order: list[str], machine: str) -> None:
    """Add rows to those on file, each in the place of an older one of its id, and write the card anew."""
    RESULTS.mkdir(exist_ok=True)
    found = json.loads(FINDINGS.read_text()) if FINDINGS.is_file() else {}
    found |= {row.id: {**asdict(row), "machine": machine} for row in rows}
    ordered = {key: found[key] for key in order if key in found}
    FINDINGS.write_text(json.dumps(ordered, indent=1) + "\n")
    CARD.write_text(card(list(ordered.values()), [key for key in order if key not in found]))


def card(rows: list[dict], missing: list[str]) -> str:
    passed = sum(row["finding"]["passed"] for row in rows)
    machines = sorted({row["machine"] for row in rows})
    lines = [
        "# Reliability card", "",
        f"Made by `tools/chaos` on {'; '.join(machines)}. {passed} of {len(rows)} rows pass"
        + (f"; not run: {', '.join(missing)}." if missing else "."), "",
        "Detected: from the fault to the first word of it. Recovered: to the first step after it, or for an engine until it serves again.",
        f"The longest silent wait for a worker, by the default deadlines: {DeadlineConfig().longest_silence_s:g} s.", "",
        "Lost: steps done twice. Prompts: lost / trained on twice, by the ledger against that of a run without a fault.", "",
        "| | fault | detected | recovered | lost | prompts | verdict | what was done and seen |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def line(row: dict) -> str:
    found = row["finding"]
    pair = "-" if found["lost_uids"] is None else f"{found['lost_uids']} / {found['duplicated_uids']}"
    cells = [
        f"[{row['id']}]({UP}{row['proof']})", row["fault"], seconds(found["detected_s"]), seconds(found["recovered_s"]),
        "-" if found["lost_steps"] is None else str(found["lost_steps"]), pair, "pass" if found["passed"] else "**FAIL**", found["said"],
    ]  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
