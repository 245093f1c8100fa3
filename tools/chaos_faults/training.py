"""`hybridrl train` in a process of its own, with what it says, whom it started, and what it left
behind.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hybridrl.core.errors import CheckpointError
from hybridrl.core.failpoints import VARIABLE
from hybridrl.run_dir.checkpoint import read_checkpoint
from hybridrl.run_dir.ledger import read_ledger

ROOT = Path(__file__).parent.parent.parent
START_S = 240.0
"""For a graph to stand, on a machine that does other things too."""


@dataclass(slots=True)
class Training:
    """A run under way. Lines are kept with the time.time() at which they came."""

    process: subprocess.Popen
    run_dir: Path
    lines: list[tuple[float, str]] = field(default_factory=list)
    arriving: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.arriving.put((time.time(), line.rstrip()))
        self.arriving.put(None)

    def until(self, pattern: str, limit_s: float = START_S) -> float:
        """When the first new line with this regular expression came.

        Raises:
            TimeoutError: none came in time, or the run ended first.
        """
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            try:
                item = self.arriving.get(timeout=left)
            except queue.Empty:
                break
            if item is None:
                self.arriving.put(None)
                raise TimeoutError(
                    f"the run ended with {self.process.wait()} before {pattern!r}: {self.tail()}"
                )
            self.lines.append(item)
            if re.search(pattern, item[1]):
                return item[0]
        raise TimeoutError(f"no {pattern!r} within {limit_s:g} s: {self.tail()}")

    def ended(self, limit_s: float) -> int:
        """Its exit status, after taking in all that it said.

        Raises:
            TimeoutError: it goes on.
        """
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the run goes on after {limit_s:g} s: {self.tail()}") from error
        try:
            while (item := self.arriving.get(timeout=30)) is not None:
                self.lines.append(item)
        except queue.Empty as error:
            raise TimeoutError(
                f"the run ended with {status}, and some process of its still holds its output: "
                f"{self.tail()}"
            ) from error
        self.arriving.put(None)
        return status

    def tail(self) -> str:
        return " / ".join(text for _, text in self.lines[-5:])

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, text) for _, text in self.lines)

    def pid(self, worker: str) -> int:
        """Of e.g. rollout/1: the process whose output goes to that worker's log, not one of its
        children. Titles lie, this does not.
        """
        log = str(self.run_dir / "logs" / f"{worker.replace('/', '-')}.log")
        found = {pid: parent for pid, parent in processes().items() if output_of(pid) == log}
        return next(pid for pid, parent in found.items() if parent not in found)

    def family(self) -> list[int]:
        """The run's process and all that descend from it."""
        parents, ours = processes(), {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sorted(ours)


def processes() -> dict[int, int]:
    """pid -> parent, of all that run and are no zombies."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def output_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return None


@contextmanager
def training(
    overrides: list[str],
    run_dir: Path,
    points: str = "",
    env: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
) -> Iterator[Training]:
    """Killed with everything it started, if it is not at its end when the block is.

    Args:
        within: a command that runs the one that follows it.
    """
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **(env or {}),
        **({VARIABLE: points} if points else {}),
    }
    command = [
        *within,
        sys.executable,
        "-u",
        "-m",
        "hybridrl.cli",
        "train",
        *overrides,
        f"run.dir={run_dir}",
    ]
    process = subprocess.Popen(
        command,
        env=variables,
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run = Training(process, run_dir)
    try:
        yield run
    finally:
        if process.poll() is None:
            for pid in reversed(run.family()):
                kill(pid)
        process.wait(60)


def kill(pid: int, number: int = signal.SIGKILL) -> float:
    """When the signal was sent."""
    at = time.time()
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return at


def usage(pid: int) -> tuple[float, int]:
    """(resident MB that is not shared, open files)."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(lines["RssAnon"].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


# -- what a run left -------------------------------------------------------------------------------


def state_at(run_dir: Path, step: int) -> object | None:
    """Every digest and the controller's state of a checkpoint; None: there is none, or it is
    damaged.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    try:
        state = read_checkpoint(folder).state
    except CheckpointError:
        return None
    return state.parts, {
        path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))
    }


def steps_saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def uids(run_dir: Path, steps: int) -> Counter[str]:
    return Counter(
        uid
        for row in read_ledger(run_dir)
        if row["step"] <= steps
        for uid in (*row["trained"], *row["passed_over"])
    )


def prompts_against(run_dir: Path, clean: Path, steps: int) -> tuple[int, int]:
    """(lost, trained on twice) up to a step."""
    ours, theirs = uids(run_dir, steps), uids(clean, steps)
    return len(theirs - ours), len(ours - theirs)
