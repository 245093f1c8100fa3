"""The most memory that a process held in each phase of its work."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET = "5"
"""Written to CLEAR, it resets the kernel's high-water mark to the memory resident now."""


class PeakMemory:
    """Records the peak memory of each phase of this process.

    Phases may overlap, and a phase may be entered several times at once; a peak counts for every
    phase that is under way.

    Example:
        with memory.phase("learn"):
            ...
        memory.take() == {"learn": 2_100_000_000}

    Args:
        peak: returns the most bytes held since its last call.
    """

    highest = 0
    """the largest peak of this process that any object of this class has read"""

    def __init__(self, peak: Callable[[], int]) -> None:
        self._peak = peak
        self._active: Counter[str] = Counter()
        self._bytes: dict[str, int] = {}

    @classmethod
    def of_device(cls, device: str) -> "PeakMemory":
        """Measure the tensors on this process's GPU for "cuda", else its resident memory."""
        return cls(allocated_peak if device == "cuda" else resident_peak)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the peak of a `with` block to this phase, also if it raises."""
        if not self._active[name]:
            self._read()
        self._active[name] += 1
        try:
            yield
        finally:
            if self._active[name] == 1:
                self._read()
            self._active[name] -= 1

    def take(self) -> dict[str, int]:
        """The bytes of each phase since the last call."""
        self._read()
        taken = self._bytes
        self._bytes = {}
        return taken

    def _read(self) -> None:
        """Count the peak since the last reading to all phases that were under way."""
        peak = self._peak()
        PeakMemory.highest = max(PeakMemory.highest, peak)
        for name in +self._active:
            self._bytes[name] = max(self._bytes.get(name, 0), peak)


def allocated_peak() -> int:
    """The most bytes of tensors on the GPU since the last call, by torch's allocator."""
    import torch

    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def resident_peak() -> int:
    """The most bytes of resident memory, shared memory included, since the last call; since the
    start of the process where the kernel does not let it reset that mark.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    with suppress(OSError):
        CLEAR.write_text(RESET)
    return int(line.split()[1]) * 1024
