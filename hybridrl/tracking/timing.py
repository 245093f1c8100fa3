"""The wall time of each phase of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from hybridrl.core.trace import Trace


class PhaseClock:
    """Adds up the wall seconds of named phases until `take` is called.

    Example:
        with clock.phase("rollout"):
            ...
        clock.take() == {"time/rollout_s": 2.1}

    Args:
        trace: in which each phase is also recorded; None: phases are not recorded.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self._trace = trace or Trace(None)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block, even if it raises; nested phases both count it."""
        begin = time.perf_counter()
        try:
            with self._trace.span(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Return the seconds per phase, keyed "time/<phase>_s", and reset the clock."""
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return metrics
