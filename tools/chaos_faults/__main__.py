"""tools/chaos [ID ...]: cause faults in real runs, print a line for each, and write the card.

Findings and card are written to tools/chaos_faults/results. A fault that was run before is replaced
on the card, so the matrix can be run in parts; each row names the commit at which it was run. The
exit status is 1 if a fault fails.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import machine

from chaos_faults.finding import Finding, Made, Row, provenance, store, summary
from chaos_faults.ground import Ground
from chaos_faults.matrix import MATRIX, Do
from chaos_faults.training import ROOT


def main(arguments: list[str]) -> int:
    fault_of = {fault.id: fault for fault in MATRIX}
    parser = argparse.ArgumentParser(
        prog="tools/chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {' '.join(fault_of)}; none: all")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"hybridrl-chaos-{os.getuid()}",
        help="folder of the runs",
    )
    options = parser.parse_args(arguments)
    # A shell starts its background jobs with SIGINT ignored, which the runs would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if unknown := set(options.ids) - fault_of.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    if not options.ids:
        shutil.rmtree(options.work, ignore_errors=True)
    ground = Ground(options.work)
    failed = False
    done = []
    made = Made(machine=f"{os.cpu_count()} cores of {machine.processor()}", commit=machine.commit())
    began = time.monotonic()
    for do, ids in grouped([key for key in fault_of if key in (options.ids or fault_of)]):
        started = time.monotonic()
        findings = attempt(do, ground, ids)
        took = time.monotonic() - started
        rows = [
            Row(
                id=key,
                fault=fault_of[key].name,
                proof=fault_of[key].proof,
                seconds=took,
                finding=findings[key],
            )
            for key in ids
        ]
        for row in rows:
            print(
                f"{'pass' if row.finding.passed else 'FAIL'}  {row.id}  {row.fault}: "
                f"{row.finding.outcome}  [{took:.0f} s]",
                flush=True,
            )
            failed |= not row.finding.passed
        store(rows, list(fault_of), made)
        done += rows
    if not options.ids:
        whole = replace(made, whole_minutes=(time.monotonic() - began) / 60)
        stored = store(done, list(fault_of), whole)
        print(provenance(stored), summary(stored))
    return int(failed)


def grouped(ids: list[str]) -> list[tuple[Do | str, list[str]]]:
    """Pairs of a scenario and the ids of its faults, because one scenario may cause several."""
    groups: dict[Do | str, list[str]] = {}
    scenario_of = {fault.id: fault.do for fault in MATRIX}
    for key in ids:
        groups.setdefault(scenario_of[key], []).append(key)
    return list(groups.items())


def attempt(do: Do | str, ground: Ground, ids: list[str]) -> dict[str, Finding]:
    """Run a scenario; returns a finding for each fault. If it raises an error, all have failed."""
    not_reached = Finding(passed=False, outcome="not reached")
    try:
        findings = dict.fromkeys(ids, tests(do)) if isinstance(do, str) else do(ground, ids)
        return {key: findings.get(key) or not_reached for key in ids}
    except (
        OSError,
        AssertionError,
        RuntimeError,
        ValueError,
        LookupError,
        StopIteration,
        subprocess.SubprocessError,
    ) as error:
        outcome = f"broke off: {type(error).__name__}: {error}"[:300]
        return dict.fromkeys(ids, Finding(passed=False, outcome=outcome))


def tests(selection: str) -> Finding:
    """Run some tests; returns whether they passed, and pytest's last line.

    Args:
        selection: test files, and optionally after -k parts of test names, separated by |.
    """
    files, _, names = selection.partition(" -k ")
    chosen = ["-k", names.replace("|", " or ")] if names else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files.split(),
        *chosen,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
    )
    last = (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Finding(passed=done.returncode == 0, outcome=f"tests: {last.strip('= ')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
