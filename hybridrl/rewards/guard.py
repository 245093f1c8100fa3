"""The guard of a child process, which ends the child and everything that the child started.

    owner == line == guard --- child --- processes of a reward function, sessions and orphans too

The guard ends them when the line closes (also because the owner was killed with SIGKILL), when a
message arrives on the line, and when the child ends by itself. It is not a child of the owner,
because Ray kills the children of a worker together with the worker. It leads its own session and is
the subreaper of its descendants: an orphan becomes the guard's child instead of init's, so no
process that a reward function starts leaves the tree below the guard. If the kernel lets the guard
make a control group (cgroup v2), the child runs in it, and one write kills the whole group, however
fast it forks.

The guard also forwards the output of the child and its descendants, escaped and at a bounded rate.
"""

import ctypes
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from hybridrl.core import redact
from hybridrl.core.plain_text import plain

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

NO_CONTROL_GROUP = "HYBRIDRL_NO_CONTROL_GROUP"
"""An environment variable; if it is set, the guard kills processes one by one, without a cgroup."""

GIVE_UP_S = 60.0  # longest wait for processes that SIGKILL does not end, e.g. of another user
OUTPUT_BYTES = 64 * 1024  # bytes of output that are forwarded in one period
OUTPUT_PERIOD_S = 60.0
LINE_CHARS = 2000
PIPE_BYTES = 1024 * 1024


def start_guard(line: Connection) -> None:
    """Fork a guard and a guarded child; the call returns only in the child.

    The calling process ends at once with exit status 0. If the child ends by itself, the guard
    sends its exit code as text over the `line`. The guard closes the line once all processes have
    ended.

    Args:
        line: the guard's end of a connection whose other end only the owner holds.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    group = make_control_group()
    output, printed = os.pipe()
    with suppress(OSError):  # the user's limit on pipe buffers may be reached
        fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # fewer context switches
    child = os.fork()
    if child == 0:
        _become_child(group, printed)
        line.close()
        os.close(output)
        return
    try:
        os.close(printed)
        _guard(line, child, group, output)
    finally:
        os._exit(0)


def _become_child(group: Path | None, printed: int) -> None:
    """Join the control group in a new session, end when the guard ends, and print into the pipe."""
    guard = os.getppid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # the guard ended before the request took effect
        os._exit(1)
    os.setsid()
    if group is not None:
        (group / "cgroup.procs").write_text("0")
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    os.close(printed)
    # New streams, because the present ones were opened for the owner's files or terminal.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _guard(line: Connection, child: int, group: Path | None, output: int) -> None:
    """Wait until the child ends, or the line closes or has a message; then end all descendants.

    Args:
        child: its process id.
        output: the end of the pipe from which the child's output is read.
    """
    wakeup, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the signal wakes `select`
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the guard must not end before the owner
    forwarder = Thread(target=_forward, args=(output,), daemon=True)
    forwarder.start()
    try:
        while (status := reaped().get(child)) is None:
            sources: list[Any] = [line, wakeup]
            ready, _, _ = select.select(sources, [], [])
            if line in ready:
                break
            os.read(wakeup, 4096)
        if status is not None:
            line.send_bytes(str(os.waitstatus_to_exitcode(status)).encode())
    except OSError:  # the owner has ended
        pass
    finally:
        end_descendants(group)
        forwarder.join(timeout=1.0)


def reaped() -> dict[int, int]:
    """The wait status of each child that has ended, by process id.

    Raises:
        ChildProcessError: this process has no children at all, running or ended.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            if ended:
                return ended
            raise
        if pid == 0:
            return ended
        ended[pid] = status


def end_descendants(group: Path | None) -> None:
    """Kill and reap the descendants of this process until there are none, for at most GIVE_UP_S.

    Args:
        group: the control group of the child, which is removed; None: it has none.
    """
    end = time.monotonic() + GIVE_UP_S
    with suppress(ChildProcessError):
        while time.monotonic() < end:
            if group is not None:
                with suppress(OSError):
                    (group / "cgroup.kill").write_text("1")
            for pid in descendants(os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not reaped():
                time.sleep(0.005)
    if group is not None:
        with suppress(OSError):
            group.rmdir()


def descendants(root: int) -> list[int]:
    """The process ids of all descendants of `root`, including zombies, parents first."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    pids: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        pids += below
        waiting += below
    return pids


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                stat = Path("/proc", entry, "stat").read_bytes()
                yield int(entry), int(stat.rpartition(b") ")[2].split()[1])


def make_control_group() -> Path | None:
    """Make a control group inside of that of this process.

    Returns:
        Its folder; None if NO_CONTROL_GROUP is set or the kernel or the permissions forbid it.
    """
    if NO_CONTROL_GROUP in os.environ:
        return None
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        root = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
        group = Path(root, own.strip("/"), f"hybridrl-reward-{os.getpid()}")
        group.mkdir()
    except (OSError, StopIteration):
        return None
    try:
        # Try it in a process: joining may be refused although making the folder was permitted.
        probe = os.fork()
        if probe == 0:
            _join_and_exit(group)
        if os.waitpid(probe, 0)[1] == 0 and (group / "cgroup.kill").exists():
            return group
        group.rmdir()
    except OSError:
        pass
    return None


def _join_and_exit(group: Path) -> None:
    status = 1
    with suppress(OSError):
        (group / "cgroup.procs").write_text("0")
        status = 0
    os._exit(status)


def prctl(option: int, value: int) -> None:
    """Call prctl(2).

    Raises:
        OSError: the kernel refuses it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _forward(output: int) -> None:
    """Write the lines that arrive on the pipe to stderr, escaped and at a bounded rate.

    It runs in a thread, because writing to stderr may block.
    """
    remaining = OUTPUT_BYTES
    dropped = 0
    end = 0.0
    line = b""
    while chunk := os.read(output, PIPE_BYTES):
        now = time.monotonic()
        if now >= end:
            _print_dropped(dropped)
            remaining = OUTPUT_BYTES
            dropped = 0
            end = now + OUTPUT_PERIOD_S
        accepted = chunk[:remaining]
        remaining -= len(accepted)
        dropped += len(chunk) - len(accepted)
        *lines, line = (line + accepted).split(b"\n")
        if len(line) > LINE_CHARS or not remaining:
            lines.append(line)
            line = b""
        for full_line in filter(None, lines):
            _print_line(full_line)
    if line:
        _print_line(line)
    _print_dropped(dropped)


def _print_line(line: bytes) -> None:
    # Truncate first, because masking takes time quadratic in the length of a word.
    text = line[: 2 * LINE_CHARS].decode(errors="backslashreplace")
    _print(plain(redact.text(text), LINE_CHARS))


def _print_dropped(count: int) -> None:
    if count:
        limit = f"{OUTPUT_BYTES // 1024} KiB in {OUTPUT_PERIOD_S:g} s are shown"
        _print(f"... {count} further bytes are not shown: {limit}")


def _print(text: str) -> None:
    with suppress(OSError):  # the owner's stderr is closed, or its disk is full
        os.write(2, f"reward function prints: {text}\n".encode())
