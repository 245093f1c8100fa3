"""Runs each part of a step in its own process: `python -m gpu_checks.part_process NAME GROUND`
prints a line of JSON for each check, and `run_part` starts such a process and reads these lines.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gpu_checks.check import Check, Verdict, failed
from gpu_checks.ground import Ground
from gpu_checks.steps import STEPS, Part

MARK = "CHECK "


def run_part(part: Part, ground: Ground) -> Iterator[Check]:
    """Yield the checks of a part as they are made.

    If its process fails or exceeds part.limit_s, the last check is one that failed.
    """
    logs = ground.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    errors = logs / f"{part.name}.err"
    environment = dict(os.environ) | ({} if ground.on_gpu else dict(part.cpu_environment))
    last = "the start"
    with (logs / f"{part.name}.out").open("w") as printed, errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_checks.part_process", part.name, ground.to_json()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(part.limit_s, end, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(MARK):
                    printed.write(line)
                    continue
                check = read_check(line)
                last = check.name
                yield check
            status = process.wait()
            expired = timer.finished.is_set()
        finally:
            timer.cancel()
            end(process)
    if status:
        after = f"after {part.limit_s:g} s" if expired else f"with status {status}"
        yield failed(
            f"{part.title}: complete",
            f"ended {after}, after {last}: {last_line(errors)} (more in {logs})",
        )


def end(process: subprocess.Popen) -> None:
    """Kill the process and all others of its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_check(line: str) -> Check:
    values = json.loads(line.removeprefix(MARK))
    return Check(**values | {"verdict": Verdict(values["verdict"])})


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "it printed nothing"


def main(arguments: Sequence[str]) -> None:
    name, ground = arguments
    part = next(part for step in STEPS for part in step.parts if part.name == name)
    module, _, function = part.run.partition(":")
    checks = getattr(importlib.import_module(f"gpu_checks.{module}"), function)
    for check in checks(Ground.from_json(ground)):
        print(MARK + json.dumps(asdict(check)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # gloo's destructors sometimes abort the process
