"""Notices on the console while workers start, which takes from seconds to many minutes."""

import time
from collections.abc import Callable, Sequence

from hybridrl.core.errors import WorkerTimeout
from hybridrl.runtime.actor_group import dump_stacks
from hybridrl.runtime.calls import Pending, gather, is_done

REMINDER_S = 20.0


class StartUp:
    """Waits for workers to start. Prints a line when one is ready, and a reminder of the others
    every REMINDER_S.

    Args:
        say: prints one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._waiting: list[Pending] = []
        self._say = say
        self._began = time.monotonic()
        self._reminded = self._began

    def wait(self, pending: Sequence[Pending]) -> None:
        """Wait for the first call to each of some workers.

        Raises:
            WorkerError: a worker could not be built, or did not answer in time; in the latter case
                all workers have been signalled to write their stacks to their logs.
        """
        for started in [p for p in pending if is_done(p)]:  # they started during an earlier wait
            self._say(f"  {started.worker} is up")
        self._waiting = [p for p in pending if not is_done(p)]
        try:
            gather(pending, self.watch)
        except WorkerTimeout:
            dump_stacks()
            raise
        self.watch()

    def watch(self) -> None:
        """Print what has changed. calls.gather calls it about every second."""
        for pending in [p for p in self._waiting if is_done(p)]:
            self._waiting.remove(pending)
            self._say(f"  {pending.worker} is up after {time.monotonic() - self._began:.0f} s")
        now = time.monotonic()
        if self._waiting and now - self._reminded >= REMINDER_S:
            self._reminded = now
            names = ", ".join(p.worker for p in self._waiting)
            self._say(f"  {now - self._began:.0f} s: {names} still loading or compiling; see logs/")
