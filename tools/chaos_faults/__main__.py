"""tools/chaos [ID ...]: do faults to real runs, print a line for each, keep findings and card in
tools/chaos_faults/results.

IDs that were run before are replaced on the card, so it can be run in pieces; each row keeps the
commit it was run at. Exit status 1 where one fails.
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

from chaos_faults.finding import Finding, Made, Row, keep, provenance, summary
from chaos_faults.ground import Ground
from chaos_faults.matrix import MATRIX, Do
from chaos_faults.training import ROOT


def main(arguments: list[str]) -> int:
    known = {fault.id: fault for fault in MATRIX}
    parser = argparse.ArgumentParser(
        prog="tools/chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {' '.join(known)}; none: all")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"hybridrl-chaos-{os.getuid()}",
        help="folder of the runs",
    )
    options = parser.parse_args(arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what is in its background deaf to it, and so its runs
    if unknown := set(options.ids) - known.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    if not options.ids:
        shutil.rmtree(options.work, ignore_errors=True)
    ground, failed, done = Ground(options.work), False, []
    made, began = (
        Made(machine=f"{os.cpu_count()} cores of {machine.processor()}", commit=commit()),
        time.monotonic(),
    )
    for do, ids in grouped([key for key in known if key in (options.ids or known)]):
        started = time.monotonic()
        found = attempt(do, ground, ids)
        took = time.monotonic() - started
        rows = [
            Row(id=i, fault=known[i].name, proof=known[i].proof, seconds=took, finding=found[i])
            for i in ids
        ]
        for row in rows:
            print(
                f"{'pass' if row.finding.passed else 'FAIL'}  {row.id}  {row.fault}: "
                f"{row.finding.said}  [{took:.0f} s]",
                flush=True,
            )
            failed |= not row.finding.passed
        keep(rows, list(known), made)
        done += rows
    if not options.ids:
        kept = keep(done, list(known), replace(made, whole_minutes=(time.monotonic() - began) / 60))
        print(provenance(kept), summary(kept))
    return int(failed)


def grouped(ids: list[str]) -> list[tuple[Do | str, list[str]]]:
    """Faults that one scenario does together."""
    groups: dict[Do | str, list[str]] = {}
    known = {fault.id: fault.do for fault in MATRIX}
    for key in ids:
        groups.setdefault(known[key], []).append(key)
    return list(groups.items())


def attempt(do: Do | str, ground: Ground, ids: list[str]) -> dict[str, Finding]:
    """A scenario that breaks off is a failed one, and does not keep the others from running."""
    try:
        found = dict.fromkeys(ids, tests(do)) if isinstance(do, str) else do(ground, ids)
        return {key: found.get(key) or Finding(passed=False, said="not reached") for key in ids}
    except (
        OSError,
        AssertionError,
        RuntimeError,
        ValueError,
        LookupError,
        StopIteration,
        subprocess.SubprocessError,
    ) as error:
        return dict.fromkeys(
            ids, Finding(passed=False, said=f"broke off: {type(error).__name__}: {error}"[:300])
        )


def tests(selection: str) -> Finding:
    """Args: selection: files, and after -k the names' parts with | between them."""
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
    return Finding(passed=done.returncode == 0, said=f"tests: {last.strip('= ')}")


def commit() -> str:
    """Short hash, with + where tracked files differ from it other than those that this tool
    writes.
    """
    git = [
        "git",
        "-C",
        str(ROOT),
        "diff",
        "--quiet",
        "HEAD",
        "--",
        ".",
        ":!tools/chaos_faults/results",
    ]
    differs = subprocess.run(git, check=False).returncode == 1
    return machine.commit().rstrip("+") + ("+" if differs else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
