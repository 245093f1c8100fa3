"""Runs `hybridrl train` in its own process, and reads its output, processes and files."""

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
"""Timeout of the start of a run, long enough for a machine that is busy with other work."""


@dataclass(slots=True)
class Training:
    """A running `hybridrl train`, and the lines of its output."""

    process: subprocess.Popen[str]
    run_dir: Path
    lines: list[tuple[float, str]] = field(default_factory=list)  # (time.time(), text)
    # lines that `until` and `ended` have not read yet; None: the output has ended
    arriving: queue.SimpleQueue[tuple[float, str] | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.arriving.put((time.time(), line.rstrip()))
        self.arriving.put(None)

    def until(self, pattern: str, limit_s: float = START_S) -> float:
        """Wait for a new line that matches a regular expression; returns its time.time().

        Raises:
            TimeoutError: no such line came within limit_s, or the run ended first.
        """
        end = time.monotonic() + limit_s
        while (remaining_s := end - time.monotonic()) > 0:
            try:
                item = self.arriving.get(timeout=remaining_s)
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
        """Wait for the end of the run and read the rest of its output; returns the exit status.

        Raises:
            TimeoutError: the run did not end within limit_s, or its output is still open 30 s
                later.
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
                f"the run ended with {status}, and one of its processes still has its output open: "
                f"{self.tail()}"
            ) from error
        self.arriving.put(None)
        return status

    def tail(self) -> str:
        """The last lines."""
        return " / ".join(text for _, text in self.lines[-5:])

    def printed(self, pattern: str) -> bool:
        """Whether any line that was read so far matches a regular expression."""
        return any(re.search(pattern, text) for _, text in self.lines)

    def pid(self, worker: str) -> int:
        """The process id of a worker, e.g. of rollout/1.

        The worker is found by its log file, to which its output goes, because process titles are
        not reliable. Its children write to the same file; the result is their common ancestor.
        """
        log = str(self.run_dir / "logs" / f"{worker.replace('/', '-')}.log")
        parents = {pid: parent for pid, parent in processes().items() if output_of(pid) == log}
        return next(pid for pid, parent in parents.items() if parent not in parents)

    def family(self) -> list[int]:
        """The process of the run and all its descendants."""
        parents = processes()
        pids = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
            pids |= more
        return sorted(pids)


def processes() -> dict[int, int]:
    """The parent of each process by pid, without zombies."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def output_of(pid: int) -> str | None:
    """The file to which a process writes its output; None: the process has ended."""
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
    """Start a run, and kill it with all its processes at the end of the `with` block.

    Args:
        overrides: its settings.
        run_dir: its run.dir.
        points: the value of HYBRIDRL_FAILPOINTS.
        env: further variables of its environment.
        within: a command that is put in front of the run's command and executes it.
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
    """Send a signal to a process, SIGKILL by default; returns the time.time() just before."""
    at = time.time()
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return at


def usage(pid: int) -> tuple[float, int]:
    """(resident MB that are not shared, number of open files) of a process."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(lines["RssAnon"].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


# -- the files of a run ----------------------------------------------------------------------------


def state_at(run_dir: Path, step: int) -> object | None:
    """Weights and controller state of a checkpoint; None: the checkpoint is absent or damaged."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    try:
        state = read_checkpoint(folder).state
    except CheckpointError:
        return None
    return state.parts, {
        path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))
    }


def steps_saved(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def uids(run_dir: Path, steps: int) -> Counter[str]:
    """How often a run has trained on or passed over each prompt up to a step, by its ledger."""
    return Counter(
        uid
        for row in read_ledger(run_dir)
        if row["step"] <= steps
        for uid in (*row["trained"], *row["passed_over"])
    )


def prompts_against(run_dir: Path, clean: Path, steps: int) -> tuple[int, int]:
    """The numbers of prompts that a run has used less often, and more often, than the run without a
    fault, up to a step.
    """
    used = uids(run_dir, steps)
    expected = uids(clean, steps)
    return len(expected - used), len(used - expected)
