"""SIGTERM (from a scheduler or `ray job stop`), SIGHUP of a closed terminal, or Ctrl-C: the run
saves what it has and ends.

The same command continues it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hybridrl.core.errors import Preempted

NAMES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "SIGHUP, the terminal was closed",
    signal.SIGINT: "Ctrl-C",
}
SAID = b"Ctrl-C: the run ends as soon as what it learned is saved; once more ends it at once\n"


class Preemption:
    """Whether the run was told to end. Asked at places where nothing would be lost; while it starts
    up, that is everywhere.
    """

    def __init__(self) -> None:
        self.told_by: str | None = None
        self.starting = True

    def started(self) -> None:
        """From here on only `check` raises.

        Raises:
            Preempted: the run was told to end before, and whoever was at work then took it for an
                error of his own.
        """
        self.starting = False
        self.check()

    @contextmanager
    def listening(self) -> Iterator["Preemption"]:
        """Take these signals while the block lasts. In a thread that gets no signals, do nothing.

        Raises:
            Preempted: one came while the run starts up.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, self._tell) for number in NAMES if not _ignored(number)
        }
        try:
            yield self
        except SystemExit as ended:  # Ray's own handler, which it sets while it starts
            if ended.code == signal.SIGTERM:
                self.told_by = self.told_by or NAMES[signal.SIGTERM]
            self.check()
            raise
        except KeyboardInterrupt:
            if self.starting:
                self.check()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises:
        Preempted: the run was told to end.
        """
        if self.told_by:
            raise Preempted(f"told to end by {self.told_by}; the same command continues")

    def _tell(self, signum: int, frame: FrameType | None) -> None:
        """Raises:
        KeyboardInterrupt: the run is starting up; or Ctrl-C, and it had been told to end before.
        Inside Ray's calls only this one passes.
        """
        at_once = self.starting or (self.told_by and signum == signal.SIGINT)
        self.told_by = self.told_by or NAMES[signum]
        if at_once:
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            with suppress(OSError):
                os.write(2, SAID)  # print may be what the signal came in the midst of


def _ignored(number: signal.Signals) -> bool:
    """Whether nohup has made the process deaf to a closed terminal, which is then no reason to
    end.
    """
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
