"""Notices on the console while workers start, which takes from seconds to many minutes."""

import time
from collections.abc import Callable, Sequence

from hybridrl.core.errors import WorkerTimeout
from hybridrl.runtime.actor_group import dump_stacks
from hybridrl.runtime.calls import Pending, gather, is_done

REMINDER_S = 20.0


def wait_for_start(pending: Sequence[Pending], say: Callable[[str], None]) -> None:
    """Wait for the first call to each of some workers, and announce each that answers.

    Raises:
        WorkerError: a worker could not be built, or did not answer in time; then all workers have
            written their stacks into their logs.
    """
    start_up = StartUp(pending, say)
    try:
        gather(pending, start_up.watch)
    except WorkerTimeout:
        dump_stacks()
        raise
    start_up.watch()


class StartUp:
    """Announces each worker when it is ready, and from time to time those that are not.

    calls.gather calls its `watch` about every second.

    Args:
        pending: the first call to each worker.
        say: prints one line.
    """

    def __init__(self, pending: Sequence[Pending], say: Callable[[str], None]) -> None:
        self._waiting = list(pending)
        self._say = say
        self._began = time.monotonic()
        self._reminded = self._began

    def watch(self) -> None:
        for pending in [p for p in self._waiting if is_done(p)]:
            self._waiting.remove(pending)
            self._say(f"  {pending.worker} is up after {time.monotonic() - self._began:.0f} s")
        now = time.monotonic()
        if self._waiting and now - self._reminded >= REMINDER_S:
            self._reminded = now
            names = ", ".join(p.worker for p in self._waiting)
            self._say(f"  {now - self._began:.0f} s: {names} still loading or compiling; see logs/")
