"""Runs a process and measures its time, its memory, and the load of the machine by other
programs.
"""

import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

EVERY_S = 0.5
END_S = 5.0
"""Between the two signals that end a process which takes too long."""
KILLED_S = 30.0
"""The longest wait for a process that got SIGKILL."""


@dataclass(slots=True)
class Watched:
    """The measurements of a process and its descendants, updated while it runs.

    Memory is resident memory that is not shared, summed over the processes that run at the same
    time.
    """

    peak_bytes: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    others_cores: float = 0.0  # mean number of cores that other programs used while it computed
    # CPU seconds when `progress` first returned a number of steps, by this number
    cpu_at: dict[int, float] = field(default_factory=dict)
    output: str = field(default="", repr=False)

    def printed(self) -> dict[str, Any]:
        """The JSON that a script of a peer has printed."""
        line = next(line for line in self.output.splitlines() if line.startswith("PEER "))
        return json.loads(line.removeprefix("PEER "))


def run(
    command: Sequence[str],
    *,
    under: str = "",
    env: Mapping[str, str] | None = None,
    limit_s: float = 3600.0,
    progress: Callable[[], int] = lambda: 0,
) -> Watched:
    """Run a command to its end; `output` of the result has its stdout and stderr.

    Args:
        under: a command that runs the given one, e.g. "taskset -c 0,1".
        env: environment variables that are added to those of this process.
        progress: returns how many steps are done; called twice a second.

    Raises:
        RuntimeError: the command failed, or took longer than limit_s.
    """
    seen = Watched()
    started = time.perf_counter()
    full = [*shlex.split(under), *command]
    with subprocess.Popen(
        full,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        done = threading.Event()
        watcher = threading.Thread(
            target=watch, args=(process.pid, seen, done, progress), daemon=True
        )
        watcher.start()
        try:
            seen.output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            end(process.pid)
            raise RuntimeError(f"{shlex.join(full)}: still running after {limit_s:g} s") from error
        finally:
            done.set()
            watcher.join()
    if process.returncode:
        raise RuntimeError(
            f"{shlex.join(full)}: exit status {process.returncode}\n{seen.output[-3000:]}"
        )
    seen.wall_s = time.perf_counter() - started
    return seen


def end(pid: int) -> None:
    """End a process and its descendants: SIGTERM, and SIGKILL after END_S."""
    processes = family(pid)
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=KILLED_S)


def busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def watch(pid: int, seen: Watched, done: threading.Event, progress: Callable[[], int]) -> None:
    cpu: dict[int, float] = {}
    before = (time.perf_counter(), busy_s(), 0.0)
    others_s = 0.0
    computing_s = 0.0
    while not done.wait(EVERY_S):
        memory = 0
        for process in family(pid):
            try:
                with process.oneshot():
                    usage = process.memory_info()
                    times = process.cpu_times()
            except psutil.Error:
                continue
            memory += usage.rss - usage.shared
            cpu[process.pid] = times.user + times.system
        now = (time.perf_counter(), busy_s(), sum(cpu.values()))
        wall, busy, own = (b - a for a, b in zip(before, now, strict=True))
        if own > wall / 5:  # the watched process is computing
            others_s += max(busy - own, 0.0)
            computing_s += wall
        before = now
        seen.peak_bytes = max(seen.peak_bytes, memory)
        seen.cpu_s = now[2]
        seen.cpu_at.setdefault(progress(), now[2])
        seen.others_cores = others_s / max(computing_s, EVERY_S)


def family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
