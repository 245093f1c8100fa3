"""The log file of a worker process."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

STACKS = signal.SIGUSR1
"""The signal at which a worker writes the stacks of its threads to its log, even while it runs code
outside Python.
"""


class WorkerLog:
    """Sends the output of this process to a file. A process has at most one.

    Child processes write to the file that was current when they were started.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = opened(path)
        self._redirect()
        faulthandler.register(STACKS, file=self._descriptor, all_threads=True)

    def move(self, path: str) -> None:
        """Write to another file from now on."""
        descriptor = opened(path)
        os.dup2(descriptor, self._descriptor)  # the stacks go there too
        os.close(descriptor)
        self._redirect()

    def _redirect(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._descriptor, 1)
        os.dup2(self._descriptor, 2)


def opened(path: str) -> int:
    """Open a file for appending, and make its folder if needed. Returns the file descriptor.

    Without the run directory, which a worker must not make anew, it is that of the present stderr.
    """
    try:
        Path(path).parent.mkdir(exist_ok=True)
    except FileNotFoundError:
        return os.dup(2)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
