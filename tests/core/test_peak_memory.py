"""The peak memory of each phase, from a few given readings and from real memory."""

import mmap

import pytest
import torch

from hybridrl.core.peak_memory import PeakMemory, resident_peak


def test_a_phase_has_the_largest_reading_while_it_was_under_way():
    readings = iter([1, 30, 20, 40, 2, 5])
    memory = PeakMemory(lambda: next(readings))
    with memory.phase("rollout"):  # reads 1, the peak before it
        with memory.phase("sync"):  # reads 30, a peak of rollout alone
            pass  # reads 20 at its end, a peak of both phases
        with memory.phase("rollout"):  # nested in itself: nothing is read
            pass
    assert memory.take() == {"rollout": 40, "sync": 20}  # reads 2, a peak of no phase
    assert memory.take() == {}


def test_a_phase_that_is_still_under_way_has_its_peak_so_far():
    readings = iter([1, 30, 50, 3, 4])
    memory = PeakMemory(lambda: next(readings))
    with memory.phase("rollout"):
        assert memory.take() == {"rollout": 30}
    assert memory.take() == {"rollout": 50}


def test_a_phase_that_fails_counts_too():
    readings = iter([1, 30, 2])
    memory = PeakMemory(lambda: next(readings))
    with pytest.raises(KeyError), memory.phase("learn"):
        raise KeyError
    assert memory.take() == {"learn": 30}


def test_resident_memory_has_its_peak_also_after_it_was_given_back():
    """64 MB of pages are mapped only during the phase; malloc would not give them back for sure."""
    memory = PeakMemory.of_device("cpu")
    with memory.phase("learn"), mmap.mmap(-1, 64_000_000) as pages:
        for page in range(0, 64_000_000, mmap.PAGESIZE):
            pages[page] = 1
    peak = memory.take()["learn"]
    assert peak - resident_peak() > 32e6
    assert PeakMemory.highest >= peak


def test_on_a_gpu_the_allocators_peak_counts_and_is_reset(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def peak() -> int:
        calls.append("read")
        return 7

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    memory = PeakMemory.of_device("cuda")
    with memory.phase("learn"):
        pass
    assert memory.take() == {"learn": 7} and calls == ["read", "reset"] * 3
