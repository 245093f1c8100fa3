"""A context in which opening a file fails, as in a process that has too many open files."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def no_more_files() -> Iterator[Callable[[], None]]:
    """Make every open fail with EMFILE, until the function that is yielded is called.

    Until then the process has as many open files as its limit allows.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    descriptors: list[int] = []

    def end() -> None:
        while descriptors:
            os.close(descriptors.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    try:
        with suppress(OSError):
            while True:
                descriptors.append(os.open("/dev/null", os.O_RDONLY))

        yield end
    finally:
        end()
