"""A process with all that it starts: how long, how much memory, and how busy the machine was with
something else.
"""

import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

EVERY_S = 0.5


@dataclass(slots=True)
class Watched:
    """Filled while the process runs.

    Memory is anonymous (private, not file-backed) and summed over the processes that live at the
    same time.
    """

    peak_bytes: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    others_cores: float = (
        0.0  # cores that other programs kept busy while this one computed, on average
    )
    cpu_at: dict[int, float] = field(
        default_factory=dict
    )  # CPU seconds so far when `progress` first said so many
    output: str = field(default="", repr=False)

    def told(self) -> dict:
        """What one of the peers' scripts printed as JSON."""
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
    """Run to the end and return what was seen; stdout and stderr are joined in `output`.

    Args:
        under: command in front, e.g. "taskset -c 0,1".
        progress: how many steps are done, asked twice a second.

    Raises:
        RuntimeError: it failed or took longer than limit_s; the end of its output is in the
            message.
    """
    seen, started = Watched(), time.perf_counter()
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
            process.terminate()
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


def busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def watch(pid: int, seen: Watched, done: threading.Event, progress: Callable[[], int]) -> None:
    cpu: dict[int, float] = {}
    before, others_s, computing_s = (time.perf_counter(), busy_s(), 0.0), 0.0, 0.0
    while not done.wait(EVERY_S):
        memory = 0
        for process in family(pid):
            try:
                with process.oneshot():
                    held, times = process.memory_info(), process.cpu_times()
            except psutil.Error:
                continue
            memory += held.rss - held.shared
            cpu[process.pid] = times.user + times.system
        now = (time.perf_counter(), busy_s(), sum(cpu.values()))
        wall, busy, own = (b - a for a, b in zip(before, now, strict=True))
        if own > wall / 5:  # it does not wait
            others_s, computing_s = others_s + max(busy - own, 0.0), computing_s + wall
        before = now
        seen.peak_bytes, seen.cpu_s = max(seen.peak_bytes, memory), now[2]
        seen.cpu_at.setdefault(progress(), now[2])
        seen.others_cores = others_s / max(computing_s, EVERY_S)


def family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
