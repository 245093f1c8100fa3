"""SIGTERM, as a scheduler or `ray job stop` sends it: the run saves what it has and ends, to be continued."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hybridrl.errors import Preempted


class Preemption:
    """Whether the run was told to end. Asked at places where nothing would be lost; while it starts up, that is everywhere."""

    def __init__(self) -> None:
        self.told, self.starting = False, True

    def started(self) -> None:
        """From here on only `check` raises.

        Raises:
            Preempted: the run was told to end before, and whoever was at work then took it for an error of his own.
        """
        self.starting = False
        self.check()

    @contextmanager
    def listening(self) -> Iterator["Preemption"]:
        """Take SIGTERM while the block lasts. In a thread that gets no signals, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield self
        except SystemExit as ended:  # Ray's own handler, which it sets while it starts
            self.told = self.told or ended.code == signal.SIGTERM
            self.check()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def check(self) -> None:
        """Raises:
        Preempted: the run was told to end.
        """
        if self.told:
            raise Preempted("told to end by SIGTERM; the same command continues")

    def _tell(self, signum: int, frame: FrameType | None) -> None:
        self.told = True
        if self.starting:
            self.check()
