"""The report about itself that an engine adds to each chunk."""

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from hybridrl.core.peak_memory import PeakMemory
from hybridrl.rollout import sampler
from hybridrl.rollout.engine import Rollout
from hybridrl.types import ChunkHeader, EngineStats, GenerateOrder, Prompt, Work
from tests.rollout.test_weight_update import Update, load, load_adapter, receive, rollout

PROMPTS = [Prompt(uid="p", input_ids=(1, 2), text="", columns={})]


def order(wave: str, tokens: int) -> GenerateOrder:
    return GenerateOrder(
        wave=wave,
        chunk=0,
        num_chunks=1,
        group_size=1,
        temperature=1.0,
        max_new_tokens=tokens,
        seed=5,
    )


async def answered(worker: Rollout, wave: str, tokens: int = 2) -> Work:
    """Generate a response with this number of tokens; returns the report."""
    answering = worker.generate(order(wave, tokens), PROMPTS)
    header: ChunkHeader = (await asyncio.wait_for(answering, timeout=60))[0]
    assert header.work is not None
    return header.work


def measured(readings: Sequence[int]) -> Rollout:
    """An engine whose peak of memory has these values at successive readings."""
    worker = rollout()
    remaining = iter(readings)
    worker.peaks = PeakMemory(lambda: next(remaining))
    return worker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sampler's clock advance by half a second at each reading, of which there is one at
    the beginning and one at the end of a step.
    """
    ticks = count(step=0.5)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic)
    monkeypatch.setattr(sampler, "time", clock)


def test_a_report_counts_the_tokens_and_the_steps_since_the_last_one(clock: None):
    """With asynchronous scheduling a response of n tokens takes n + 1 steps."""
    worker = rollout()

    async def run() -> list[Work]:
        return [await answered(worker, "a", tokens=2), await answered(worker, "b", tokens=5)]

    assert asyncio.run(run()) == [
        Work(tokens=2, busy_s=3 * 0.5, peak_bytes={}),
        Work(tokens=5, busy_s=6 * 0.5, peak_bytes={}),
    ]


@pytest.mark.parametrize("update", [load, load_adapter, receive])
def test_the_peak_of_a_sync_is_in_the_reports_until_the_next_one(update: Update):
    """After a sync, the probe and possibly an evaluation sample; no step reads their reports."""
    of_sampling = (0, 5, 0)  # read before it, at its end, and for the report
    worker = measured([*(0, 70), *of_sampling, *of_sampling, *(0, 60), *of_sampling])

    async def run() -> list[dict[str, int]]:
        await update(worker)
        found = [(await answered(worker, "probe")).peak_bytes]
        found.append((await answered(worker, "step 1")).peak_bytes)
        await update(worker)
        found.append((await answered(worker, "step 2")).peak_bytes)
        return found

    first, second, third = asyncio.run(run())
    assert first == second == {"rollout": 5, "sync": 70}
    assert third == {"rollout": 5, "sync": 60}


def test_what_an_engine_did_for_an_earlier_job_is_not_reported(clock: None):
    worker = measured([*(0, 70), 0, *(0, 5, 0)])

    async def run() -> tuple[EngineStats, Work]:
        await load(worker)
        await worker.sampler.generate(order("dropped", 2), PROMPTS)  # makes no report
        stats = SchedulerStats(num_running_reqs=3)
        worker.meter.record(scheduler_stats=stats, iteration_stats=None)
        await worker.begin_job()
        return worker.meter.take(), await answered(worker, "w")

    stats, work = asyncio.run(run())
    assert stats == EngineStats()
    assert work == Work(tokens=2, busy_s=3 * 0.5, peak_bytes={"rollout": 5})
