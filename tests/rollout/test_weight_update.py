"""Updates of weights while a response is being sampled, with vLLM's asynchronous scheduling."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from hybridrl.core.errors import WeightSyncError
from hybridrl.rollout.engine import Rollout
from hybridrl.rollout.rollouter import SingleTurn
from hybridrl.rollout.sampler import Sampler
from hybridrl.rollout.vllm_internals import EngineMeter, adapter_request
from hybridrl.settings.choices import Source
from hybridrl.types import FinishReason, GenerateOrder, Prompt, RolloutBatch, WeightManifest
from tests.support.pipelined_engine import PipelinedEngine

Update = Callable[[Rollout], Awaitable[object]]


def manifest(version: int, digest: str) -> WeightManifest:
    return WeightManifest(
        version=version, names=(), shapes=(), dtypes=(), offsets=(), nbytes=0, digest=digest
    )


def rollout() -> Rollout:
    made = Rollout.__new__(Rollout)
    made.own_process = False
    made.peaks = None
    made.last_sync = {}
    made.meter = EngineMeter()
    made.engine = PipelinedEngine()
    made.sampler = Sampler(made.engine, SingleTurn(), Source.student)
    return made


async def load(worker: Rollout) -> None:
    """Update the weights as with the backend object_store."""
    await worker.load_weights(manifest(1, "digest 1"), np.zeros(0, np.uint8))


async def load_adapter(worker: Rollout) -> None:
    """Update an adapter as with lora.sync=adapter."""
    worker.sampler.adapter = adapter_request()
    await load(worker)


async def receive(worker: Rollout) -> None:
    """Update the weights as with nccl and ipc, whose calls yield the event loop in between."""
    await worker.start_weight_update()
    await turns(5)
    await worker.update_weights({"manifest": {"version": 1}})
    await turns(5)
    await worker.finish_weight_update(1)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def sampled(worker: Rollout, update: Update) -> RolloutBatch:
    """Sample a response of eight tokens, with an update after some of them."""
    prompt = Prompt(uid="p", input_ids=(1, 2), text="", columns={})
    order = GenerateOrder(
        wave="w", chunk=0, num_chunks=1, group_size=1, temperature=1.0, max_new_tokens=8, seed=5
    )

    async def run() -> RolloutBatch:
        sampling = asyncio.create_task(worker.generate(order, [prompt]))
        await turns(8)
        await update(worker)
        return (await asyncio.wait_for(sampling, timeout=60))[1]

    return asyncio.run(run())


@pytest.mark.parametrize("update", [load, load_adapter, receive])
def test_each_token_has_the_version_of_the_weights_that_sampled_it(update: Update):
    batch = sampled(rollout(), update)
    tokens = batch.input_ids[batch.response_mask].tolist()
    assert batch.policy_versions[batch.response_mask].tolist() == tokens
    assert tokens == sorted(tokens) and set(tokens) == {0, 1}


@pytest.mark.parametrize("update", [load, load_adapter, receive])
def test_the_order_is_pause_then_collect_then_update_then_version_then_resume(
    update: Update,
):
    worker = rollout()
    sampled(worker, update)
    events = worker.engine.events
    pause = events.index("pause")
    assert events[:pause].count("launch") == events[:pause].count("collect") + 1, "one is under way"
    resume = events.index("resume")
    within = [e for e in events[pause : resume + 1] if e != "received_digest"]
    calls = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert within == [
        "pause",
        "synchronize_device",  # part of vLLM's own pause, which collects no pending results
        "collect",
        "synchronize_device",
        *(["load_adapter"] if update is load_adapter else calls),
        "version 1",
        "resume",
    ]
    assert events[resume + 1] == "launch"


def answered(worker: Rollout, wave: str) -> asyncio.Task:
    """Request a response of two tokens; returns the pending task."""
    prompt = Prompt(uid="p", input_ids=(1, 2), text="", columns={})
    order = GenerateOrder(
        wave=wave, chunk=0, num_chunks=1, group_size=1, temperature=1.0, max_new_tokens=2, seed=5
    )
    return asyncio.create_task(worker.generate(order, [prompt]))


def test_a_sleeping_engine_takes_weights_and_samples_only_when_its_kv_cache_is_back_too():
    worker = rollout()
    events = worker.engine.events

    async def run() -> None:
        await worker.sleep()
        await worker.sleep()
        asked = answered(worker, "w")  # a run never does this to a sleeping engine
        await turns(5)
        assert (await worker.ping())["asleep"] == 2
        await worker.wake_up(["weights"])
        await worker.wake_up(["weights"])
        await receive(worker)
        await turns(5)
        assert (await worker.ping())["asleep"] == 1 and "launch" not in events
        await worker.wake_up(["weights", "kv_cache"])
        batch = (await asyncio.wait_for(asked, timeout=60))[1]
        assert batch.policy_versions[batch.response_mask].tolist() == [1, 1]

    asyncio.run(run())
    moves = [event for event in events if event.startswith(("sleep", "wake", "start_", "finish_"))]
    assert moves == [
        "sleep",
        "wake_up weights",
        "start_weight_update",
        "finish_weight_update",
        "wake_up kv_cache",
    ]


def test_an_engine_does_not_sleep_while_a_response_is_under_way():
    worker = rollout()

    async def run() -> None:
        asked = answered(worker, "w")
        await turns(4)
        with pytest.raises(RuntimeError, match="a response is under way"):
            await worker.sleep()
        await asyncio.wait_for(asked, timeout=60)
        await worker.sleep()

    asyncio.run(run())
    assert "sleep" in worker.engine.events


def test_an_engine_with_half_an_update_samples_no_more_when_it_wakes_up():
    worker = rollout()

    async def run() -> None:
        await worker.sleep()
        await worker.wake_up(["weights"])
        await worker.start_weight_update()
        await worker.wake_up(["kv_cache"])
        answered(worker, "w")
        await turns(5)
        assert "launch" not in worker.engine.events
        await worker.finish_weight_update(1)
        await turns(5)
        assert "launch" in worker.engine.events

    asyncio.run(run())


def test_an_engine_with_half_an_update_samples_no_more():
    worker = rollout()

    async def refuse(worker: Rollout) -> None:
        with pytest.raises(WeightSyncError, match="acknowledge the digests"):
            await worker.load_weights(manifest(1, "another digest"), np.zeros(0, np.uint8))
        await turns(5)
        assert worker.engine.events[-1] == "received_digest"
        assert await worker.abort() == 1

    assert list(sampled(worker, refuse).finish_reasons) == [FinishReason.aborted]
