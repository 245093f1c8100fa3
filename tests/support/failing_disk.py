"""Reads that really fail, for as long as a test wants them to."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def no_more_files() -> Iterator[Callable[[], None]]:
    """While it lasts, this process has as many files open as it may: every open fails with EMFILE.
    Yields what ends that.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))

        def end() -> None:
            while held:
                os.close(held.pop())

        yield end
    finally:
        end()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
