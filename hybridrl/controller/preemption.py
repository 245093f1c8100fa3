"""Stop signals: on SIGTERM (from a scheduler or `ray job stop`), SIGHUP (from a closed terminal) or
Ctrl-C the run saves its state and ends.

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
NOTICE = (
    b"Ctrl-C: the run ends as soon as what it learned is saved; press Ctrl-C again to end it at "
    b"once\n"
)


class Preemption:
    """Whether a stop signal has arrived.

    The run calls `check` at points where nothing would be lost. Before `started` is called, a
    signal interrupts the run anywhere.
    """

    def __init__(self, notice: bytes = NOTICE) -> None:
        """
        Args:
            notice: what a first Ctrl-C prints.
        """
        self.notice = notice
        self.signal_name: str | None = None  # of the first stop signal; None: none has arrived
        self.starting = True

    def started(self) -> None:
        """Mark the end of the start: from this call on only `check` raises.

        Raises:
            Preempted: a stop signal arrived earlier, and a library swallowed the exception.
        """
        self.starting = False
        self.check()

    @contextmanager
    def listening(self) -> Iterator["Preemption"]:
        """Handle stop signals while the block lasts. Does nothing outside the main thread, where
        Python cannot handle signals.

        Raises:
            Preempted: one arrived while the run was starting, or Ray's handler raised SystemExit
                for it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, self._handle) for number in NAMES if not _ignored(number)
        }
        try:
            yield self
        except SystemExit as error:  # from Ray's own handler, which it sets while it starts
            if error.code == signal.SIGTERM:
                self.signal_name = self.signal_name or NAMES[signal.SIGTERM]
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
        """Raise if a stop signal has arrived.

        Raises:
            Preempted: it names the signal.
        """
        if self.signal_name:
            raise Preempted(f"ended by {self.signal_name}; run the same command again to continue")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first stop signal, and interrupt the run where it must end at once.

        Raises:
            KeyboardInterrupt: the run is starting; or this is Ctrl-C, and not the first stop
                signal. No other exception passes through Ray's calls.
        """
        at_once = self.starting or (self.signal_name and signum == signal.SIGINT)
        self.signal_name = self.signal_name or NAMES[signal.Signals(signum)]
        if at_once:
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            with suppress(OSError):
                os.write(
                    2, self.notice
                )  # the signal may have interrupted a print, so print is unsafe


def _ignored(number: signal.Signals) -> bool:
    """Whether `number` is SIGHUP and ignored, as in a process that nohup started."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
