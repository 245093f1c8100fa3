"""The file that has the output of a worker's process."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

STACKS = signal.SIGUSR1
"""Makes a worker write the stack of each of its threads into its log, also while it is busy outside
Python.
"""


class WorkerLog:
    """The output of this process, which goes to a file from now on. There is one in a process.

    Processes that it starts write to the file of the time of their start.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = opened(path)
        self._redirect()
        faulthandler.register(STACKS, file=self._descriptor, all_threads=True)

    def move(self, path: str) -> None:
        """Write to another file from here on."""
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
    """The descriptor of a file that grows, in a folder that is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
